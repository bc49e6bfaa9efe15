"""Calls of every differentiable function beyond the hashing ones, for the tests of the adapters."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import subquad

BATCH, HEADS, HEADS_KV, SEQ, DIM, DIM_V = 2, 4, 2, 20, 8, 5


@dataclass
class AdapterCase:
    """One call. arrays: the differentiable ones in the order of their gradients; a group of them is a tuple. side: the
    other arrays. options: the rest, and asks: those that ask for further results. num_zero: how many gradients are 0.
    """

    name: str
    function: str
    arrays: dict[str, Any]
    side: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    asks: dict[str, Any] = field(default_factory=dict)
    num_zero: int = 0

    def __str__(self):
        return self.name


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def uniform(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).random(shape).astype(np.float32)


def qkv(seed=0, seq=SEQ):
    q = normal(BATCH, HEADS, seq, DIM, seed=seed)
    return {
        "q": q,
        "k": normal(BATCH, HEADS_KV, seq, DIM, seed=seed),
        "v": normal(BATCH, HEADS_KV, seq, DIM_V, seed=seed),
    }


def mask(seed=3, seq=SEQ):
    return np.random.default_rng(seed).random((BATCH, seq)) < 0.7


def positive(*shape, seed=0):
    return uniform(*shape, seed=seed) + np.float32(0.1)


_KEYS = {"key_mask": mask()}
_MASKS = {"key_mask": mask(), "query_mask": mask(4)}
_BIAS = {"key_bias": normal(BATCH, HEADS, SEQ)}
_GATE = {"gate": uniform(BATCH, HEADS_KV, SEQ)}
_DECAY, _DECAYS = {"decay": uniform(HEADS_KV)}, {"decay": uniform(BATCH, HEADS_KV, SEQ)}
_PAIR = {"landmarks": (normal(BATCH, HEADS, 4, DIM), normal(BATCH, HEADS_KV, 4, DIM, seed=1))}
_CHUNKS = {"landmarks": (normal(BATCH, HEADS_KV, 5, DIM), normal(BATCH, HEADS_KV, 5, DIM, seed=1))}
_NOISE, _CHUNK_NOISE = {"noise": normal(BATCH, HEADS, 8, DIM)}, {"noise": normal(BATCH, HEADS_KV, 5, DIM)}
_FEATURES = {
    "fq": positive(BATCH, HEADS, SEQ, 6), "fk": positive(BATCH, HEADS_KV, SEQ, 6, seed=1), "v": qkv()["v"],
}  # fmt: skip
_DRAWS = {
    "indices": np.random.default_rng(2).integers(0, SEQ, (BATCH, HEADS, 2, SEQ)).astype(np.int32),
    "noise": normal(BATCH, HEADS, 2, SEQ, DIM),
}
_X = {"x": normal(BATCH, HEADS, SEQ, DIM)}
_PAIRED = {"mask": mask(), "paired_mask": mask(5, 9)}
_CAUSAL = dict(is_causal=True)
_PARTS = {
    "out1": normal(BATCH, HEADS, SEQ, DIM_V), "lse1": normal(BATCH, HEADS, SEQ),
    "out2": normal(BATCH, HEADS, SEQ, DIM_V, seed=1), "lse2": normal(BATCH, HEADS, SEQ, seed=1),
}  # fmt: skip
_PROJECTION = {"projection": normal(6, DIM)}
_HEAD_PROJECTION = {"projection": normal(HEADS_KV, 6, DIM)}
_LSE, _COUNTS, _FACTOR = {"return_lse": True}, {"return_counts": True}, {"return_log_factor": True}

ADAPTER_CASES = [
    AdapterCase("softmax", "softmax_attention", qkv(), asks=_LSE),
    AdapterCase("softmax_biased", "softmax_attention", qkv() | _BIAS, _KEYS, dict(scale=0.5, window=(3, 2)), asks=_LSE),
    AdapterCase("softmax_causal", "softmax_attention", qkv(), _KEYS, dict(**_CAUSAL), asks=_LSE),
    AdapterCase("merge", "merge_states", _PARTS),
    AdapterCase("segments", "segment_mean", _X, options=dict(num_segments=4), asks=_COUNTS),
    AdapterCase("segments_paired", "segment_mean", _X, _PAIRED, dict(num_segments=6), asks=_COUNTS),
    AdapterCase("segments_sized", "segment_mean", _X, {"mask": mask()}, dict(segment_size=3), asks=_COUNTS),
    AdapterCase("positive", "feature_map", _X | _PROJECTION),
    AdapterCase("positive_masked", "feature_map", _X | _HEAD_PROJECTION, {"mask": mask()}),
    AdapterCase("log_hyperbolic", "feature_map", _X | _HEAD_PROJECTION, {}, dict(features="hyperbolic", log=True)),
    AdapterCase("trig", "feature_map", _X | _PROJECTION, {}, dict(features="trig", scale=0.5), _FACTOR),
    AdapterCase("elu", "feature_map", _X, {}, dict(features="elu")),
    AdapterCase("linear", "linear_attention", _FEATURES, _KEYS),
    AdapterCase("linear_weighted", "linear_attention", _FEATURES | {"key_log_weight": normal(BATCH, HEADS_KV, SEQ)}),
    AdapterCase("linear_gated", "linear_attention", _FEATURES | _GATE, _KEYS, _CAUSAL),
    AdapterCase("linear_decay", "linear_attention", _FEATURES | _DECAY, {}, dict(is_causal=True, normalize=False)),
    AdapterCase("linear_decays", "linear_attention", _FEATURES | _DECAYS, {}, _CAUSAL),
    AdapterCase("rfa", "rfa_attention", qkv(), _KEYS, dict(num_features=6, seed=3), _LSE),
    AdapterCase("rfa_hyperbolic", "rfa_attention", qkv() | _HEAD_PROJECTION, {}, dict(features="hyperbolic")),
    AdapterCase("rfa_gated", "rfa_attention", qkv() | _GATE, {}, dict(num_features=6, orthogonal=False, **_CAUSAL)),
    AdapterCase("rfa_trig", "rfa_attention", qkv() | _PROJECTION | _GATE, _KEYS, dict(features="trig", **_CAUSAL)),
    AdapterCase("rfa_elu", "rfa_attention", qkv(), {}, dict(features="elu")),
    AdapterCase("randomized", "randomized_attention", qkv(), _KEYS, dict(num_samples=2, seed=3)),
    AdapterCase("randomized_given", "randomized_attention", qkv(), _DRAWS, dict(noise_std=0.7, grad="unbiased")),
    AdapterCase("lara", "lara_attention", qkv(), _MASKS, dict(num_landmarks=4), _LSE),
    AdapterCase("lara_landmarks", "lara_attention", qkv() | _PAIR, _NOISE, dict(mis="bh", noise_std="published")),
    AdapterCase("lara_drawn", "lara_attention", qkv() | _PAIR, _MASKS, dict(seed=3, t_norm="landmark")),
    AdapterCase("eva", "eva_attention", qkv(), _KEYS, dict(window=8, chunk_size=4, seed=3), _LSE),
    AdapterCase("eva_landmarks", "eva_attention", qkv() | _CHUNKS, _CHUNK_NOISE, dict(window=8, chunk_size=4)),
    AdapterCase("eva_causal", "eva_attention", qkv() | _CHUNKS, _KEYS, dict(window=4, chunk_size=4, **_CAUSAL)),
]  # fmt: skip

# Calls with a state: what the second half of the tokens takes from the first.
STATE_CASES = [
    AdapterCase("linear", "linear_attention", _FEATURES, {}, _CAUSAL),
    AdapterCase("linear_log", "linear_attention", _FEATURES, _GATE, dict(is_causal=True, log_features=True)),
    AdapterCase("rfa", "rfa_attention", qkv(), _PROJECTION, _CAUSAL),
    AdapterCase("rfa_relu", "rfa_attention", qkv(), _KEYS | _GATE, dict(features="relu", num_features=6, **_CAUSAL)),
    AdapterCase("eva", "eva_attention", qkv(), {}, dict(window=4, chunk_size=2, **_CAUSAL)),
    AdapterCase("mean", "running_mean", {"v": qkv()["v"]}, _KEYS),
]
TOKENS = {"q": 2, "k": 2, "v": 2, "fq": 2, "fk": 2, "gate": 2, "key_mask": 1}


_SEVERAL = (
    "softmax_attention", "merge_states", "feature_map", "sparse_attention", "sea_attention", "attention_divergence",
)  # fmt: skip
_COTANGENTS = {"feature_map": ("dout", "dlog_factor"), "attention_divergence": ("dkl", "dsse")}
# The function that is the backward pass, and the axis that its second argument is the extent of.
_ADJOINTS = {"expand_values": ("block_sum", "x", 3), "block_sum": ("expand_values", "y", 3)}


def differentiable(case, results):
    """Those of the results that have gradients."""
    return results if case.function in _SEVERAL else results[:1]


def plain_gradients(case, arrays, side, results, given):
    """The plain function's gradients for cotangents of its differentiable results, in any framework."""
    if case.function in _ADJOINTS:
        adjoint, of, axis = _ADJOINTS[case.function]
        options = {name: x for name, x in case.options.items() if name == "is_causal"}
        return (getattr(subquad, adjoint)(given[0], arrays[of].shape[axis], **side, **options),)
    backward = getattr(subquad, f"{case.function}_bwd")
    more = dict(zip(_COTANGENTS.get(case.function, ("dout", "dlse")), given, strict=False))
    if "lse" in inspect.signature(backward).parameters and len(results) == 2:
        more |= dict(zip(("out", "lse"), results, strict=True))
    if case.function == "segment_mean":
        arrays = {"seq": arrays["x"].shape[2]}
    gradients = backward(**more, **arrays, **side, **case.options)
    return gradients if isinstance(gradients, tuple) else (gradients,)


def flat(arrays):
    """The arrays of a dictionary, groups flattened."""
    return [x for value in arrays.values() for x in (value if isinstance(value, tuple) else (value,))]


def regrouped(arrays, values):
    """A dictionary like `arrays` from a flat sequence."""
    values = iter(values)
    return {
        name: tuple(next(values) for _ in x) if isinstance(x, tuple) else next(values) for name, x in arrays.items()
    }


def halves(case):
    """The arrays of a case with a state, cut between the tokens."""
    given = case.arrays | case.side
    cut = SEQ // 2 + 1
    return [
        {n: np.take(x, range(*part), TOKENS[n]) if n in TOKENS else x for n, x in given.items()}
        for part in ((0, cut), (cut, SEQ))
    ]
