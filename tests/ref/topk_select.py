"""The k largest scores of a group, in a total order: larger value first, NaN behind -inf, then the lower flat index.

Groups and their flat order: query (m), row_heads (h, m), head (n, m), batch (h, n, m), the last index fastest.
"""

import numpy as np

from .pairs import visible_pairs

AXES = {"query": (0, 1, 2, 3), "row_heads": (0, 2, 1, 3), "head": (0, 1, 2, 3), "batch": (0, 1, 2, 3)}
OUTER = {"query": 3, "row_heads": 2, "head": 2, "batch": 1}


def by_group(x, group):
    """[B, H, N, M] -> [..., elements of a group in flat order]."""
    x = np.transpose(x, AXES[group])
    return x.reshape(*x.shape[: OUTER[group]], int(np.prod(x.shape[OUTER[group] :])))


def from_group(x, group, shape):
    """The inverse of by_group: -> [B, H, N, M] of the given shape."""
    moved = x.reshape([shape[axis] for axis in AXES[group]])
    return np.transpose(moved, np.argsort(AXES[group]))


def largest(values, candidates, count):
    """Ascending flat indices of the `count` first of the candidates (bool), by value and index."""
    values = np.asarray(values).astype(np.float64)
    nan = np.isnan(values)
    order = np.lexsort((np.arange(len(values)), -np.where(nan, 0, values), nan))
    return np.sort(order[candidates[order]][:count])


def topk_select(scores, k, *, group="query", key_mask=None, is_causal=False, dtype=np.float64):
    """scores [B, H, N, M] -> int32 flat indices [..., k], ascending, -1 behind the last. dtype changes nothing."""
    batch, _, seq_q, seq_k = scores.shape
    seen = np.broadcast_to(visible_pairs(batch, seq_q, seq_k, key_mask, None, is_causal), scores.shape)
    scores, seen = by_group(np.asarray(scores), group), by_group(seen, group)
    out = np.full((*scores.shape[:-1], k), -1, np.int32)
    for row in np.ndindex(*scores.shape[:-1]):
        best = largest(scores[row], seen[row], k)
        out[row][: len(best)] = best
    return out
