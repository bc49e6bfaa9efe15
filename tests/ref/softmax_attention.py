"""Exact softmax attention with additive biases, its log-sum-exp and gradient.

    x_nm = s <q_n, k_m> + c |k_m|^2 + key_bias_m + pair_bias_nm
    lse_n = ln sum_m e^{x_nm},   out_n = sum_m e^{x_nm - lse_n} v_m

Source: Vaswani et al. 2017. A query that sees no key, or only keys of bias -inf, gives 0 and lse = -inf.
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, sum_groups, visible_pairs, weighted_sum


def softmax_scale(scale, dim, dtype):
    """s, where None stands for D^-1/2."""
    return dtype(dim**-0.5 if scale is None else scale)


def log_softmax_sum(x):
    """x [..., M] -> softmax [..., M] and log-sum-exp [...]; a row of -inf gives 0 and -inf."""
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(top), x.dtype.type(0), top)
    e = np.exp(x - shift)
    total = e.sum(axis=-1, keepdims=True)
    p = np.divide(e, total, out=np.zeros_like(e), where=total != 0)
    lse = np.log(total, out=np.full_like(total, -np.inf), where=total != 0) + shift
    return p, lse[..., 0]


def softmax_from(x, lse):
    """e^{x - lse}, 0 in a row of -inf: how a backward pass forms the weights again, from lse in its own precision."""
    return np.exp(x - np.where(np.isneginf(lse), x.dtype.type(0), lse)[..., None])


def window_pairs(seq_q, seq_k, window):
    """[N, M] bool: keys n + (M - N) - left .. n + (M - N) + right, -1 = unbounded."""
    offset = np.arange(seq_k)[None, :] - np.arange(seq_q)[:, None] - (seq_k - seq_q)
    left, right = (-1, -1) if window is None else window
    return ((left < 0) | (offset >= -left)) & ((right < 0) | (offset <= right))


def softmax_logits(q, k, key_mask, query_mask, is_causal, window, scale, key_bias, key_norm_bias, pair_bias):
    """x [B, H, N, M], -inf where a pair is not seen; q and k (with as many heads as q) are clear of masked tokens."""
    seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask, query_mask, is_causal)
    seen = seen & window_pairs(q.shape[2], k.shape[2], window)
    x = scale * (q @ k.swapaxes(-1, -2))
    if key_norm_bias:
        x = x + q.dtype.type(key_norm_bias) * (k * k).sum(axis=-1)[:, :, None, :]
    if key_bias is not None:
        bias = np.asarray(key_bias).astype(q.dtype)
        x = x + np.repeat(bias, q.shape[1] // bias.shape[1], axis=1)[:, :, None, :]
    if pair_bias is not None:
        x = x + np.asarray(pair_bias).astype(q.dtype)
    return np.where(seen, x, q.dtype.type(-np.inf))


def softmax_attention(
    q, k, v, *, scale=None, key_bias=None, key_mask=None, is_causal=False, window=None, return_lse=False,
    query_mask=None, key_norm_bias=0, pair_bias=None, dtype=np.float64,
):  # fmt: skip
    """q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E] -> [B, H, N, E] (, lse [B, H, N])."""
    heads, scale = q.shape[1], softmax_scale(scale, q.shape[-1], dtype)
    q = clear_masked(q, query_mask, dtype)
    k, v = (repeat_heads(clear_masked(x, key_mask, dtype), heads) for x in (k, v))
    x = softmax_logits(q, k, key_mask, query_mask, is_causal, window, scale, key_bias, key_norm_bias, pair_bias)
    p, lse = log_softmax_sum(x)
    out = weighted_sum(p, v)
    return (out, lse) if return_lse else out


def softmax_attention_bwd(
    dout, q, k, v, *, scale=None, key_bias=None, key_mask=None, is_causal=False, window=None, dlse=None, out=None,
    lse=None, query_mask=None, key_norm_bias=0, pair_bias=None, dtype=np.float64,
):  # fmt: skip
    """-> dq, dk, dv [, dkey_bias] [, dpair_bias]. dout or dlse may be None. out and lse are formed again.

    dx_nm = p_nm (<dout_n, v_m> - <dout_n, out_n> + dlse_n),   dv_m = sum_n p_nm dout_n
    dq_n = s sum_m dx_nm k_m,   dk_m = s sum_n dx_nm q_n + 2 c k_m sum_n dx_nm
    """
    heads, heads_kv, scale = q.shape[1], k.shape[1], softmax_scale(scale, q.shape[-1], dtype)
    q = clear_masked(q, query_mask, dtype)
    k, v = (repeat_heads(clear_masked(x, key_mask, dtype), heads) for x in (k, v))
    x = softmax_logits(q, k, key_mask, query_mask, is_causal, window, scale, key_bias, key_norm_bias, pair_bias)
    p = softmax_from(x, log_softmax_sum(x)[1])
    dout = np.zeros((*q.shape[:3], v.shape[-1]), dtype) if dout is None else clear_masked(dout, query_mask, dtype)
    g = dout @ v.swapaxes(-1, -2) - (dout * weighted_sum(p, v)).sum(axis=-1, keepdims=True)
    if dlse is not None:
        g = g + np.asarray(dlse).astype(dtype)[..., None]
    dx = np.where(p != 0, p * g, dtype(0))
    dq = scale * weighted_sum(dx, k)
    dk = scale * weighted_sum(dx.swapaxes(-1, -2), q) + dtype(2 * key_norm_bias) * k * dx.sum(axis=2)[..., None]
    dv = weighted_sum(p.swapaxes(-1, -2), dout)
    gradients = [dq, sum_groups(dk, heads_kv), sum_groups(dv, heads_kv)]
    if key_bias is not None:
        gradients.append(sum_groups(dx.sum(axis=2), np.shape(key_bias)[1]))
    if pair_bias is not None:
        gradients.append(dx)
    return tuple(gradients)
