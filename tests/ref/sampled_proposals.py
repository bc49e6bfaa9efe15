"""Samples of the proposal of randomized attention: w_sn = q_n + k_{i(s,n)} + noise_std noise_sn, 0 where i = -1.

Source: Zheng et al., ICML 2022.
"""

import numpy as np

from .pairs import repeat_heads, sum_groups


def drawn_rows(x, indices):
    """x [B, H, M, D], indices [B, H, S, N] -> [B, H, S, N, D], 0 where the index is -1."""
    batch, heads = np.arange(x.shape[0])[:, None, None, None], np.arange(x.shape[1])[:, None, None]
    padded = np.concatenate([x, np.zeros((*x.shape[:2], 1, x.shape[3]), x.dtype)], axis=2)
    return padded[batch, heads, indices]


def sampled_proposals(q, k, indices, noise, *, noise_std=1.0, dtype=np.float64):
    """noise [1 | B, H, S, N, D] -> w [B, H, S, N, D]."""
    q, k, noise = (np.asarray(x).astype(dtype) for x in (q, k, noise))
    w = q[:, :, None] + drawn_rows(repeat_heads(k, q.shape[1]), indices) + dtype(noise_std) * noise
    return np.where(np.asarray(indices)[..., None] >= 0, w, dtype(0))


def sampled_proposals_bwd(dw, q, k, indices, *, score=None, scale=None, dtype=np.float64):
    """-> dq, dk. The indices are fixed; score is the cotangent of s <q_n, k_i>, the drawn key's log-weight.

    dq_n = sum_s (dw_sn + s c_sn k_{i(s,n)}),   dk_m = sum_{s,n: i(s,n) = m} (dw_sn + s c_sn q_n)
    """
    heads, heads_kv = q.shape[1], k.shape[1]
    q, k, dw = (np.asarray(x).astype(dtype) for x in (q, k, dw))
    drawn = np.asarray(indices)[..., None] >= 0
    to_q = to_k = np.where(drawn, dw, dtype(0))
    if score is not None:
        c = np.asarray(score).astype(dtype)[..., None] * dtype(q.shape[-1] ** -0.5 if scale is None else scale)
        to_q = to_q + np.where(drawn, c * drawn_rows(repeat_heads(k, heads), indices), dtype(0))
        to_k = to_k + np.where(drawn, c * q[:, :, None], dtype(0))
    dk = np.zeros((*q.shape[:2], *k.shape[2:]), dtype)
    for b, h, s, n in zip(*np.nonzero(drawn[..., 0]), strict=True):
        dk[b, h, indices[b, h, s, n]] += to_k[b, h, s, n]
    return to_q.sum(axis=2), sum_groups(dk, heads_kv)
