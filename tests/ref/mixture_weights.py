"""The weights with which every query combines the samples of a mixture: the `opt` rule of LARA.

    t_nc = e^{s <q_bar_c, q_n> - column_lse_c} (a softmax over n), or the softmax over c of s <q_bar_c, q_n>
    log_alpha_nj = ln max(1e-8, balance_j + alpha_coeff (t_nc(j) - mean_c' t_nc')),   c(j) = j mod C

with t and its mean over the landmarks that exist. Source: Zheng et al., ICML 2022 (LARA), the optimal weights.
"""

import numpy as np

from .mixture_proposals import existing, own
from .pairs import clear_masked
from .softmax_attention import log_softmax_sum, softmax_scale

FLOOR = 1e-8


def column_lse(q, q_bar, *, scale=None, query_mask=None, dtype=np.float64):
    """ln sum_n e^{s <q_bar_c, q_n>} over the queries kept: [B, H, C]."""
    q, q_bar = clear_masked(q, query_mask, dtype), np.asarray(q_bar).astype(dtype)
    x = softmax_scale(scale, q.shape[-1], dtype) * (q_bar @ q.swapaxes(-1, -2))
    if query_mask is not None:
        x = np.where(np.asarray(query_mask, bool)[:, None, None, :], x, dtype(-np.inf))
    return log_softmax_sum(x)[1]


def weights(q, q_bar, balance, lse, scale, alpha_coeff, query_mask, counts, dtype):
    """-> q, q_bar, t [B, H, N, C], alpha before the floor [B, H, N, J], exists [B, 1, 1, C], kept [B, 1, N, 1]."""
    batch, landmarks = q_bar.shape[0], q_bar.shape[2]
    exists = existing(counts, batch, landmarks)
    q, q_bar = clear_masked(q, query_mask, dtype), clear_masked(q_bar, exists, dtype)
    kept = np.ones((batch, q.shape[2]), bool) if query_mask is None else np.asarray(query_mask, bool)
    exists, kept = exists[:, None, None, :], kept[:, None, :, None]
    x = np.where(exists, scale * (q @ q_bar.swapaxes(-1, -2)), dtype(-np.inf))
    if lse is None:
        t = log_softmax_sum(x)[0]
    else:
        seen = exists & kept
        t = np.exp(np.where(seen, x, -np.inf) - np.where(seen, np.asarray(lse).astype(dtype)[:, :, None, :], dtype(0)))
    t = np.where(kept, t, dtype(0)).astype(dtype)
    centred = t - t.sum(axis=-1, keepdims=True) / np.maximum(exists.sum(axis=-1, keepdims=True), 1).astype(dtype)
    c = own(landmarks, np.shape(balance)[-1])
    alpha = np.asarray(balance).astype(dtype)[:, :, None, :] + dtype(alpha_coeff) * centred[..., c]
    return q, q_bar, t, alpha, exists, kept


def mixture_weights(
    q, q_bar, balance, *, column_lse=None, scale=None, alpha_coeff=1.0, query_mask=None, counts=None, dtype=np.float64
):
    """q [B, H, N, D], q_bar [B, H, C, D], balance [B, H, J] -> log_alpha [B, H, N, J]."""
    scale = softmax_scale(scale, q.shape[-1], dtype)
    arguments = column_lse, scale, alpha_coeff, query_mask, counts, dtype
    _, _, _, alpha, exists, kept = weights(q, q_bar, balance, *arguments)
    used = exists[..., own(q_bar.shape[2], alpha.shape[-1])] & kept
    return np.where(used, np.log(np.maximum(np.where(used, alpha, dtype(1)), dtype(FLOOR))), dtype(-np.inf))


def mixture_weights_bwd(
    dlog_alpha, q, q_bar, balance, *, column_lse=None, scale=None, alpha_coeff=1.0, query_mask=None, counts=None,
    dtype=np.float64,
):  # fmt: skip
    """-> dq, dq_bar, dbalance, through column_lse too; 0 where the floor holds."""
    scale = softmax_scale(scale, q.shape[-1], dtype)
    arguments = column_lse, scale, alpha_coeff, query_mask, counts, dtype
    q, q_bar, t, alpha, exists, kept = weights(q, q_bar, balance, *arguments)
    landmarks, c = q_bar.shape[2], own(q_bar.shape[2], alpha.shape[-1])
    free = exists[..., c] & kept & (alpha > dtype(FLOOR))
    dalpha = np.divide(np.asarray(dlog_alpha).astype(dtype), alpha, out=np.zeros_like(alpha), where=free)
    dcentred = np.zeros_like(t)
    for j, landmark in enumerate(c):
        dcentred[..., landmark] += dtype(alpha_coeff) * dalpha[..., j]
    mean = dcentred.sum(axis=-1, keepdims=True) / np.maximum(exists.sum(axis=-1, keepdims=True), 1).astype(dtype)
    dt = dcentred - mean
    over = -1 if column_lse is None else 2
    dx = t * (dt - (dt * t).sum(axis=over, keepdims=True))
    assert dx.shape[-1] == landmarks
    return scale * (dx @ q_bar), scale * (dx.swapaxes(-1, -2) @ q), dalpha.sum(axis=2)
