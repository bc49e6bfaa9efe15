"""Patterns, probabilities and weights that the tests of the sparse family share."""

import numpy as np

from ref.patterns import Blocks, Csr, pack
from ref.visible_keys import visible_keys

GROUPS = ["query", "row_heads", "head", "batch"]
CAUSAL_GROUPS = ["query", "row_heads"]


def masks(batch, seq_q, seq_k, masked=True, causal=False, seed=7):
    """key_mask with holes and left padding, query_mask, is_causal; of three items the last has no key."""
    rng = np.random.default_rng(seed)
    keywords = dict(is_causal=causal)
    if masked:
        key_mask, query_mask = rng.random((batch, seq_k)) < 0.7, rng.random((batch, seq_q)) < 0.8
        key_mask[min(batch - 1, 1), : seq_k // 3] = False
        if batch > 2:
            key_mask[-1] = False
        keywords |= dict(key_mask=key_mask, query_mask=query_mask)
    return keywords


def probabilities(batch, heads, seq_q, num_columns, seed=3, ties=False):
    """Rows that sum to 1, float32; ties: few different values."""
    scores = np.random.default_rng(seed).standard_normal((batch, heads, seq_q, num_columns))
    e = np.exp(np.round(scores) if ties else scores)
    return (e / e.sum(axis=-1, keepdims=True)).astype(np.float32)


def random_blocks(batch, heads, seq_q, seq_k, num_columns, block_cap, density=0.4, seed=5, **keywords):
    rng = np.random.default_rng(seed)
    sizes = dict(batch=batch, num_queries=seq_q, num_keys=seq_k)
    visible, positions = visible_keys(
        keywords.get("key_mask"), keywords.get("query_mask"), is_causal=keywords.get("is_causal", False), **sizes
    )
    bits = pack(rng.random((batch, heads, seq_q, num_columns)) < density)
    given = positions if keywords.get("key_mask") is not None else None
    return Blocks(bits, num_columns, visible, block_cap, given, seq_k)


def random_csr(batch, heads, seq_q, seq_k, density=0.3, seed=6, weighted=False, index=np.int64):
    """Some rows are empty, some full; some weights are 0 (log-weight -inf)."""
    rng = np.random.default_rng(seed)
    taken = rng.random((batch, heads, seq_q, seq_k)) < density
    taken[:, :, ::5], taken[:, :, 3::7] = False, True
    indptr = np.concatenate([[0], np.cumsum(taken.sum(axis=-1).ravel())]).astype(index)
    weights = rng.standard_normal(int(indptr[-1])).astype(np.float32)
    weights[rng.random(weights.shape) < 0.1] = -np.inf
    indices = np.nonzero(taken)[3].astype(np.int32)
    return Csr(indptr, indices, taken.shape, weights if weighted else None)


def random_indices(batch, heads, seq_q, seq_k, count, seed=8, weighted=False):
    """Lists in any order, with repeats and with -1."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, max(seq_k, 1), (batch, heads, seq_q, count)).astype(np.int32)
    indices[rng.random(indices.shape) < 0.2] = -1
    indices[:, :, ::6] = -1
    if not weighted:
        return indices
    weights = rng.standard_normal(indices.shape).astype(np.float32)
    weights[rng.random(weights.shape) < 0.1] = -np.inf
    return indices, weights


def public(pattern, make=lambda x: x):
    """A pattern of the references as the library's, with arrays made by `make`."""
    import subquad

    if isinstance(pattern, (tuple, np.ndarray)):
        return tuple(make(part) for part in pattern) if isinstance(pattern, tuple) else make(pattern)
    fields = {name: make(x) if isinstance(x, np.ndarray) else x for name, x in vars(pattern).items()}
    return (subquad.BlockPattern if isinstance(pattern, Blocks) else subquad.CsrPattern)(**fields)


def dense(csr):
    """A CSR pattern as [B, H, N, M] bool."""
    out = np.zeros((int(np.prod(csr.shape[:3])), csr.shape[3]), bool)
    out[np.repeat(np.arange(len(out)), np.diff(csr.indptr)), csr.indices] = True
    return out.reshape(csr.shape)


def sea_weights(heads, dim, features, num_columns, causal, table=64, seed=9):
    """Weights of sea_estimate at the sizes of a trained layer: every stage gets inputs of order 1."""
    rng = np.random.default_rng(seed)
    splits, width = (2, num_columns // 4) if causal else (4, num_columns // 2)
    channels, wide = splits * heads, 2 * dim

    def draw(*shape, size=None):
        return ((np.prod(shape[1:]) ** -0.5 if size is None else size) * rng.standard_normal(shape)).astype(np.float32)

    def norm(count):
        return 1 + draw(count, size=0.2), draw(count, size=0.2)

    weights = dict(
        projection=draw(features, dim, size=1.0), encoder_weight=2 * draw(wide, 3 * dim),
        encoder_bias=draw(wide, size=0.1), scaler_weight=2 * draw(2, wide), scaler_bias=draw(2, size=0.5),
        row_weight=2 * draw(splits * width, wide), row_bias=draw(splits * width, size=0.1),
        conv1_weight=1.5 * draw(channels, channels, 3, 3), conv1_bias=draw(channels, size=0.1),
        conv2_weight=1.5 * draw(channels, channels, 3, 3), conv2_bias=draw(channels, size=0.1),
    )  # fmt: skip
    weights["encoder_norm_weight"], weights["encoder_norm_bias"] = norm(wide)
    if causal:
        weights |= dict(position=draw(table, dim, size=1.0), out_weight=2 * draw(heads, channels))
        weights["row_norm_weight"], weights["row_norm_bias"] = norm(width)
        weights["norm_weight"], weights["norm_bias"] = norm(num_columns)
    else:
        weights["out_weight"] = 3 * draw(heads, channels, 3, 3)
    return weights | dict(out_bias=draw(heads, size=0.1))
