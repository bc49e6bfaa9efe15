"""Calls of sparse attention and SEA, for the tests of the adapters."""

import numpy as np

from adapter_cases import BATCH, DIM, DIM_V, HEADS, HEADS_KV, SEQ, AdapterCase, mask, normal, uniform
from sparse_cases import masks, probabilities, public, random_blocks, random_csr, random_indices, sea_weights

SEQ_K, COLUMNS = 23, 12


def _qkv(heads_kv, seq_k=SEQ_K):
    k, v = normal(BATCH, heads_kv, seq_k, DIM, seed=1), normal(BATCH, heads_kv, seq_k, DIM_V)
    return {"q": normal(BATCH, HEADS, SEQ, DIM), "k": k, "v": v}


def _pattern(make, *args, **keywords):
    return {"pattern": public(make(BATCH, *args, **keywords))}


_GROUPED = _qkv(HEADS_KV)
_SEA = _qkv(HEADS) | {"probs": probabilities(BATCH, HEADS, SEQ, COLUMNS)}
_SELF = _qkv(HEADS, SEQ) | {"probs": _SEA["probs"]}
_SCALE, _MIX = {"row_scale": uniform(BATCH, HEADS, SEQ)}, {"mix": uniform(BATCH, HEADS, SEQ, seed=1)}
_CONTEXT, _ONE = {"context": normal(BATCH, HEADS, SEQ, DIM_V)}, {"context": normal(BATCH, HEADS, 1, DIM_V)}
_KEYS = {"key_mask": mask(seq=SEQ_K)}
_MASKS = _KEYS | {"query_mask": mask(4)}
_SIZES = HEADS, SEQ, SEQ_K
_LSE, _CAUSAL = {"return_lse": True}, {"is_causal": True}
_TEACHER = {"q_teacher": normal(BATCH, HEADS, SEQ, 6), "k_teacher": normal(BATCH, 1, SEQ_K, 6)}
_STUDENT = {name: _GROUPED[name] for name in "qk"}
_V, _PROBS = {"v": _SEA["v"]}, {"probs": _SEA["probs"]}
_X, _Y = {"x": normal(BATCH, HEADS, SEQ, COLUMNS)}, {"y": normal(BATCH, HEADS, SEQ, SEQ_K)}

_PAIR = _pattern(random_indices, HEADS_KV, SEQ, SEQ_K, 7, weighted=True)
_WEIGHTED = _pattern(random_csr, *_SIZES, weighted=True, index=np.int32)
_BLOCKS_MASKED = _pattern(random_blocks, *_SIZES, COLUMNS, 3, **masks(BATCH, SEQ, SEQ_K))
_SCALED, _GATED = _GROUPED | _SCALE, _SEA | _SCALE | _MIX
_TOP, _KEYS_OF, _COLUMNS_OF = {"top_k": 5}, {"num_keys": SEQ_K}, {"num_columns": COLUMNS}

# The last one of each function stands for it where one is enough.
SPARSE_CASES = [
    AdapterCase("list", "sparse_attention", _GROUPED, _pattern(random_indices, 1, SEQ, SEQ_K, 7)),
    AdapterCase("list_heads", "sparse_attention", _GROUPED, _pattern(random_indices, *_SIZES, 7), asks=_LSE),
    AdapterCase("list_pair", "sparse_attention", _SCALED, _PAIR, asks=_LSE),
    AdapterCase("csr", "sparse_attention", _GROUPED, _pattern(random_csr, *_SIZES, index=np.int32), dict(scale=0.5)),
    AdapterCase("csr_weights", "sparse_attention", _SCALED, _WEIGHTED, asks=_LSE),
    AdapterCase("blocks", "sparse_attention", _GROUPED, _pattern(random_blocks, *_SIZES, COLUMNS, 3), asks=_LSE),
    AdapterCase("blocks_masked", "sparse_attention", _SCALED, _BLOCKS_MASKED, dict(scale=0.5), _LSE),
    AdapterCase("sea", "sea_attention", _SEA, {}, _TOP, num_zero=1),
    AdapterCase("sea_context", "sea_attention", _SEA | _MIX | _CONTEXT, {}, dict(group="query", **_TOP), _LSE, 1),
    AdapterCase("sea_one_context", "sea_attention", _GATED | _ONE, _MASKS, dict(block_cap=2, **_TOP), {}, 1),
    AdapterCase("sea_head", "sea_attention", _SEA | _SCALE, _MASKS, dict(top_k=4.5, group="head", scale=0.3), {}, 1),
    AdapterCase("sea_pool", "sea_attention", _SEA | _MIX, _MASKS, dict(group="batch", **_TOP), _LSE),
    AdapterCase("sea_causal", "sea_attention", _SELF | _SCALE | _MIX, {}, _TOP | _CAUSAL | dict(budget="paper"), {}, 1),
    AdapterCase("sea_causal_masked", "sea_attention", _GATED, _MASKS, _TOP | _CAUSAL, _LSE, 1),
    AdapterCase("mean", "running_mean", _V),
    AdapterCase("mean_masked", "running_mean", _V, _KEYS, dict(num_queries=17)),
    AdapterCase("pool", "block_pool", _V | _PROBS),
    AdapterCase("pool_masked", "block_pool", _V | _PROBS, _MASKS),
    AdapterCase("expand", "expand_values", _X, {}, _KEYS_OF),
    AdapterCase("expand_masked", "expand_values", _X, _MASKS, _KEYS_OF | _CAUSAL),
    AdapterCase("sum", "block_sum", _Y, {}, _COLUMNS_OF),
    AdapterCase("sum_masked", "block_sum", _Y, _MASKS, _COLUMNS_OF | _CAUSAL),
    AdapterCase("divergence", "attention_divergence", _STUDENT, _TEACHER),
    AdapterCase("divergence_masked", "attention_divergence", _STUDENT, _TEACHER | _MASKS, _CAUSAL | dict(scale=0.5)),
]

# teacher_blocks has no derivative: its arrays are constants.
TEACHER_CASES = [
    AdapterCase("teacher", "teacher_blocks", {}, _STUDENT, _COLUMNS_OF),
    AdapterCase("teacher_masked", "teacher_blocks", {}, _STUDENT | _MASKS, _COLUMNS_OF | _CAUSAL | dict(scale=0.5)),
]


def estimate(causal, seq=SEQ, masked=True):
    """q, k, v, weights and keywords of sea_estimate."""
    arrays = {name: normal(BATCH, HEADS, seq, DIM, seed=i) for i, name in enumerate("qkv")}
    side = {"key_mask": mask(seq=seq)} if masked else {}
    return arrays | side, sea_weights(HEADS, DIM, 11, 8, causal), {"is_causal": causal}
