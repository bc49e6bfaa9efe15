"""Randomized attention: softmax attention as an expectation over drawn proposals, without bias for exact noise.

    i ~ softmax_m(s <q_n, k_m>),   w = q_n + k_i + noise_std eps,   f(w) = softmax_m(s <w, k_m> - s |k_m|^2 / 2) v
    out_n = (1 / S) sum_s f(w_sn);   noise_std exact: s^-1/2

Source: Zheng et al., ICML 2022. A query that sees no key gives 0.
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, sum_groups, visible_pairs, weighted_sum
from .softmax_attention import log_softmax_sum, softmax_from, softmax_scale


def noise_factor(noise_std, scale):
    return {"exact": scale**-0.5, "published": 1.0}.get(noise_std, noise_std)


def samples(q, k, indices, noise, noise_std, scale, key_mask, dtype):
    """-> w [B, H, S, N, D] and the logits [B, H, S, N, M] of f(w); k has as many heads as q."""
    drawn = np.take_along_axis(k[:, :, None], np.maximum(indices, 0)[..., None], axis=3) if k.shape[2] else dtype(0)
    w = q[:, :, None] + drawn + dtype(noise_factor(noise_std, scale)) * np.asarray(noise).astype(dtype)
    x = scale * (w @ k[:, :, None].swapaxes(-1, -2)) - scale / 2 * (k * k).sum(axis=-1)[:, :, None, None, :]
    seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask)[:, None] & (indices >= 0)[..., None]
    return w, np.where(seen, x, dtype(-np.inf))


def randomized_attention(
    q, k, v, *, indices, noise, noise_std="exact", scale=None, key_mask=None, grad="pathwise", dtype=np.float64
):
    """indices [B, H, S, N], noise [1 | B, H, S, N, D] -> [B, H, N, E]."""
    q, scale = np.asarray(q).astype(dtype), softmax_scale(scale, q.shape[-1], dtype)
    k, v = (repeat_heads(clear_masked(x, key_mask, dtype), q.shape[1]) for x in (k, v))
    _, x = samples(q, k, indices, noise, noise_std, scale, key_mask, dtype)
    p, _ = log_softmax_sum(x)
    values = np.broadcast_to(v[:, :, None], (*p.shape[:3], *v.shape[2:]))
    return weighted_sum(p, values).mean(axis=2, dtype=dtype)


def randomized_attention_bwd(
    dout, q, k, v, *, indices, noise, noise_std="exact", scale=None, key_mask=None, grad="pathwise", dtype=np.float64
):
    """-> dq, dk, dv with the indices fixed (pathwise: biased in q and k); unbiased adds, with y the softmax attention,

    dlogit_nm += (1 / S) sum_s <dout_n, f_sn - y_n> (1[m = i(s,n)] - pi_nm),   logit_nm = s <q_n, k_m>
    """
    heads_kv, scale = k.shape[1], softmax_scale(scale, q.shape[-1], dtype)
    q, dout = np.asarray(q).astype(dtype), np.asarray(dout).astype(dtype)
    k, v = (repeat_heads(clear_masked(x, key_mask, dtype), q.shape[1]) for x in (k, v))
    w, x = samples(q, k, indices, noise, noise_std, scale, key_mask, dtype)
    p = softmax_from(x, log_softmax_sum(x)[1])
    count = dtype(p.shape[2])
    f = p @ v[:, :, None]
    g = (dout / count)[:, :, None]  # of every f_sn
    dx = p * (g @ v[:, :, None].swapaxes(-1, -2) - (g * f).sum(axis=-1, keepdims=True))
    dv = (p.swapaxes(-1, -2) @ g).sum(axis=2)
    dw = scale * (dx @ k[:, :, None])
    dk = (scale * (dx.swapaxes(-1, -2) @ w)).sum(axis=2) - scale * dx.sum(axis=(2, 3))[..., None] * k
    drawn = np.arange(k.shape[2]) == indices[..., None]  # [B, H, S, N, M]
    dq = dw.sum(axis=2)
    dk = dk + (drawn.swapaxes(-1, -2).astype(dtype) @ dw).sum(axis=2)
    if grad == "unbiased":
        seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask)
        pi, _ = log_softmax_sum(np.where(seen, scale * (q @ k.swapaxes(-1, -2)), dtype(-np.inf)))
        score = (g * (f - (pi @ v)[:, :, None])).sum(axis=-1, keepdims=True)
        dlogit = (score * (drawn.astype(dtype) - pi[:, :, None])).sum(axis=2)
        dq = dq + scale * (dlogit @ k)
        dk = dk + scale * (dlogit.swapaxes(-1, -2) @ q)
    else:
        assert grad == "pathwise"
    return dq, sum_groups(dk, heads_kv), sum_groups(dv, heads_kv)
