"""Softmax attention over the entries of a pattern, its log-sum-exp and gradient.

    s_e = scale <q_n, k_m> + log_weight_e,   lse_n = ln sum_e e^{s_e},   out_n = row_scale_n sum_e e^{s_e - lse_n} v_m

over the entries e = (n, m) of row n. A row without entries, or with weights 0 alone, gives 0 and lse -inf. Entries that
name the same pair add their weights, so that the pattern is one matrix of log-weights W_nm.
"""

import numpy as np

from .pairs import repeat_heads, sum_groups, weighted_sum
from .patterns import pattern_matrix
from .softmax_attention import log_softmax_sum, softmax_scale


def pattern_softmax(q, k, pattern, scale, dtype):
    """q, k [B, H, ..] -> the weights [B, H, N, M], 0 where there is no entry, and lse [B, H, N]."""
    log_weights = pattern_matrix(pattern, *q.shape[:3], k.shape[2], dtype)
    with np.errstate(invalid="ignore"):
        logits = scale * (q @ k.swapaxes(-1, -2)) + log_weights
    return log_softmax_sum(np.where(np.isneginf(log_weights), dtype(-np.inf), logits))


def cast(dtype, heads, q, *keys):
    return np.asarray(q).astype(dtype), *(repeat_heads(np.asarray(x).astype(dtype), heads) for x in keys)


def sparse_attention(q, k, v, pattern, *, scale=None, row_scale=None, return_lse=False, dtype=np.float64):
    """q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E] -> [B, H, N, E] (, lse [B, H, N])."""
    scale = softmax_scale(scale, q.shape[-1], dtype)
    q, k, v = cast(dtype, q.shape[1], q, k, v)
    p, lse = pattern_softmax(q, k, pattern, scale, dtype)
    out = weighted_sum(p, v)
    if row_scale is not None:
        out = np.asarray(row_scale).astype(dtype)[..., None] * out
    return (out, lse) if return_lse else out


def sparse_attention_bwd(
    dout, q, k, v, pattern, *, scale=None, row_scale=None, dlse=None, out=None, lse=None, dtype=np.float64
):
    """-> dq, dk, dv [, drow_scale]. out and lse are formed again. With r = row_scale and o = sum_e p_e v_m:

    ds_e = p_e (r_n <dout_n, v_m - o_n> + dlse_n),   dv_m = sum_n r_n p_e dout_n,   dr_n = <dout_n, o_n>
    """
    scale, heads_kv = softmax_scale(scale, q.shape[-1], dtype), k.shape[1]
    dout = np.asarray(dout).astype(dtype)
    q, k, v = cast(dtype, q.shape[1], q, k, v)
    p, _ = pattern_softmax(q, k, pattern, scale, dtype)
    mean = weighted_sum(p, v)
    r = np.ones(p.shape[:3], dtype) if row_scale is None else np.asarray(row_scale).astype(dtype)
    with np.errstate(invalid="ignore"):
        g = r[..., None] * (dout @ v.swapaxes(-1, -2) - (dout * mean).sum(axis=-1, keepdims=True))
    if dlse is not None:
        g = g + np.asarray(dlse).astype(dtype)[..., None]
    ds = p * np.where(p != 0, g, dtype(0))
    dq = scale * weighted_sum(ds, k)
    dk = scale * weighted_sum(ds.swapaxes(-1, -2), q)
    dv = weighted_sum((r[..., None] * p).swapaxes(-1, -2), dout)
    gradients = dq, sum_groups(dk, heads_kv), sum_groups(dv, heads_kv)
    return gradients if row_scale is None else (*gradients, (dout * mean).sum(axis=-1))
