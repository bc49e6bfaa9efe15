"""Attention by the probability that two codes are equal.

    out_i = sum_j u(x_ij)^tau v_j,   u(x) = 1 - acos(x) / pi,   x_ij = <q_i, k_j> / (||q_i|| ||k_j||)

Source: Zeng et al., ICML 2021 (YOSO-E). A zero row has x = 0. The exact gradient uses the fused form, where the pole of
dp/dx at x = 1 cancels against the normalisation; "lower_bound" is the published dp/dx := (tau / 2) u^tau.
"""

import numpy as np

from .l2_normalize import l2_normalize, l2_normalize_bwd
from .pairs import clear_masked, repeat_heads, sum_groups, visible_pairs, weighted_sum


def agreement(x):
    """u(x): the probability that a random hyperplane leaves two unit vectors of product x on one side."""
    return 1 - np.arccos(np.clip(x, -1, 1)) / x.dtype.type(np.pi)


def cosines(qhat, khat, seen):
    """x_ij, and 0 where the pair is not seen. khat has as many heads as qhat."""
    return np.where(seen, np.clip(qhat @ khat.swapaxes(-1, -2), -1, 1), qhat.dtype.type(0))


def collision_attention(q, k, v, hash_bits, *, key_mask=None, query_mask=None, is_causal=False, dtype=np.float64):
    """q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E] -> [B, H, N, E]."""
    heads = q.shape[1]
    seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask, query_mask, is_causal)
    qhat, _ = l2_normalize(clear_masked(q, query_mask, dtype), dtype)
    khat, _ = l2_normalize(clear_masked(k, key_mask, dtype), dtype)
    p = np.where(seen, agreement(cosines(qhat, repeat_heads(khat, heads), seen)) ** hash_bits, dtype(0))
    return weighted_sum(p, repeat_heads(clear_masked(v, key_mask, dtype), heads))


def tangent_sum(coefficients, x, rows_hat, columns_hat):
    """sum_j coefficients_ij t_ij, t_ij = (columns_j - x_ij rows_i) / sqrt(1 - x_ij^2), a unit vector, 0 at |x| = 1."""
    sine = np.sqrt((1 - x) * (1 + x))
    c = np.divide(coefficients, sine, out=np.zeros_like(coefficients), where=sine != 0)
    return weighted_sum(c, columns_hat) - (c * x).sum(axis=-1, keepdims=True) * rows_hat


def collision_attention_bwd(
    dout, q, k, v, hash_bits, *, grad="exact", key_mask=None, query_mask=None, is_causal=False, dtype=np.float64
):
    """-> dq, dk, dv of the raw (not normalised) q and k. With w_ij = <dout_i, v_j>:

    exact:        dq_i = (1 / ||q_i||) sum_j w_ij (tau / pi) u^(tau-1) t_ij
    lower_bound:  dqhat_i = sum_j w_ij (tau / 2) u^tau khat_j, then through the normalisation
    """
    heads, heads_kv, tau = q.shape[1], k.shape[1], dtype(hash_bits)
    seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask, query_mask, is_causal)
    dout = clear_masked(dout, query_mask, dtype)
    qhat, q_lse = l2_normalize(clear_masked(q, query_mask, dtype), dtype)
    khat, k_lse = l2_normalize(clear_masked(k, key_mask, dtype), dtype)
    khat_h, v_h = repeat_heads(khat, heads), repeat_heads(clear_masked(v, key_mask, dtype), heads)

    x = cosines(qhat, khat_h, seen)
    u = agreement(x)
    w = np.where(seen, dout @ v_h.swapaxes(-1, -2), dtype(0))
    dv = weighted_sum(np.where(seen, u**hash_bits, dtype(0)).swapaxes(-1, -2), dout)
    if grad == "exact":
        c = w * (tau / dtype(np.pi)) * u ** (hash_bits - 1)
        dqhat = tangent_sum(c, x, qhat, khat_h)
        dkhat = tangent_sum(c.swapaxes(-1, -2), x.swapaxes(-1, -2), khat_h, qhat)
    else:
        assert grad == "lower_bound"
        c = w * (tau / 2) * u**hash_bits
        dqhat, dkhat = weighted_sum(c, khat_h), weighted_sum(c.swapaxes(-1, -2), qhat)
    dq = l2_normalize_bwd(dqhat, qhat, q_lse, dtype)
    dk = l2_normalize_bwd(sum_groups(dkhat, heads_kv), khat, k_lse, dtype)
    return dq, dk, sum_groups(dv, heads_kv)
