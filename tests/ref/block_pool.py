"""One pooled value per head: values weighted by how much probability the queries give to their column, on average.

    i_c = (1 / T) sum over the kept queries of probs_nc,   out = sum_r i_{col(r, n)} v_r

r = rank of a kept key, n = number of kept keys, T = number of kept queries. Not normalised: the weights add up to about
n / K. Without a kept query or key it is 0.
"""

import numpy as np

from .block_map import key_columns
from .pairs import clear_masked


def token_columns(v, num_columns, key_mask):
    """[B, K, M] 0 or 1: kept key m is in column c."""
    columns = key_columns(v.shape[0], 1, v.shape[2], num_columns, key_mask)
    return (columns == np.arange(num_columns)[:, None]).astype(np.int64)


def kept_queries(probs, query_mask, dtype):
    """-> [B, N] bool, T [B, 1, 1] (at least 1)."""
    batch, _, seq_q, _ = probs.shape
    kept = np.ones((batch, seq_q), bool) if query_mask is None else np.asarray(query_mask, bool)
    return kept, np.maximum(kept.sum(axis=-1), 1).astype(dtype)[:, None, None]


def block_pool(v, probs, *, key_mask=None, query_mask=None, dtype=np.float64):
    """v [B, H, M, E], probs [B, H, N, K] -> [B, H, 1, E]."""
    _, total = kept_queries(probs, query_mask, dtype)
    importance = clear_masked(probs, query_mask, dtype).sum(axis=2) / total
    weights = importance @ token_columns(v, probs.shape[3], key_mask).astype(dtype)
    return weights[:, :, None] @ clear_masked(v, key_mask, dtype)


def block_pool_bwd(dout, v, probs, *, key_mask=None, query_mask=None, dtype=np.float64):
    """-> dv, dprobs: dv_r = i_{col(r)} dout,   dprobs_nc = (1 / T) sum_{r in c} <dout, v_r> for the kept queries."""
    dout = np.asarray(dout).astype(dtype)
    kept, total = kept_queries(probs, query_mask, dtype)
    members = token_columns(v, probs.shape[3], key_mask).astype(dtype)
    weights = (clear_masked(probs, query_mask, dtype).sum(axis=2) / total) @ members
    products = clear_masked(v, key_mask, dtype) @ dout.swapaxes(-1, -2)
    dimportance = (members[:, None] @ products)[..., 0] / total
    return weights[..., None] * dout, np.where(kept[:, None, :, None], dimportance[:, :, None], dtype(0))
