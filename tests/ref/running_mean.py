"""The mean of the values up to each query.

    out_n = (S + sum_m v_m) / (c + |{m}|) over the kept m <= n + (M - N)

with the sum S and the count c of what came before; 0 where nothing did.
"""

import numpy as np

from .pairs import clear_masked, visible_pairs, weighted_sum


def prefix(v, num_queries, key_mask, state, dtype):
    """-> the rows' members [B, 1, N, M], the sums before [B, H, 1, E], the counts [B, 1, N, 1] (at least 1)."""
    batch, heads, seq_k, dim = v.shape
    seen = visible_pairs(batch, seq_k if num_queries is None else num_queries, seq_k, key_mask, None, True)
    total, count = np.zeros((batch, heads, dim), dtype), np.zeros(batch, np.int64)
    if state is not None:
        total, count = np.asarray(state[0]).astype(dtype), np.asarray(state[1])
    counts = seen.sum(axis=-1, keepdims=True) + count[:, None, None, None]
    return seen, np.where(count[:, None, None] > 0, total, 0)[:, :, None], np.maximum(counts, 1).astype(dtype)


def running_mean(v, *, num_queries=None, key_mask=None, state=None, return_state=False, dtype=np.float64):
    """v [B, H, M, E] -> [B, H, N, E] (, (sum [B, H, E], count [B] int32))."""
    seen, before, counts = prefix(v, num_queries, key_mask, state, dtype)
    values = clear_masked(v, key_mask, dtype)
    sums = np.cumsum(values, axis=2)
    seq_q, seq_k = seen.shape[2:]
    ends = np.arange(seq_q) + seq_k - seq_q
    reached = sums[:, :, np.maximum(ends, 0)] if seq_k else np.zeros((*v.shape[:2], seq_q, v.shape[3]), dtype)
    out = (before + np.where((ends >= 0)[:, None], reached, dtype(0))) / counts
    if not return_state:
        return out
    kept = np.full(v.shape[0], seq_k) if key_mask is None else np.asarray(key_mask, bool).sum(axis=-1)
    count = kept if state is None else kept + np.asarray(state[1])
    return out, (before[:, :, 0] + values.sum(axis=2), count.astype(np.int32))


def running_mean_bwd(dout, v, *, num_queries=None, key_mask=None, state=None, dtype=np.float64):
    """dv_m = sum over the rows n that have m of dout_n / count_n; 0 for a masked key."""
    num_queries = dout.shape[2] if num_queries is None else num_queries
    seen, _, counts = prefix(v, num_queries, key_mask, state, dtype)
    shares = np.asarray(dout).astype(dtype) / counts
    members = np.broadcast_to(seen, (*dout.shape[:3], v.shape[2]))
    return weighted_sum(members.swapaxes(-1, -2).astype(dtype), shares)
