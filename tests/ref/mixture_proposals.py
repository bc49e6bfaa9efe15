"""Samples of a mixture of Gaussian proposals centred at landmarks, with their log-densities.

    mu_c = q_bar_c + k_bar_c,   w_j = mu_c(j) + noise_std noise_j,   c(j) = j mod C
    l_jc = s <w_j, mu_c> - s |mu_c|^2 / 2,   m_j = ln sum_c e^{l_jc} over the landmarks that exist
    log_density_j = l_{j,c(j)} (opt) or m_j (bh, biased), +inf where landmark c(j) does not exist
    balance_j = e^{l_{j,c(j)} - m_j} / R (opt), R = J / C,   keys_j = w_j + mu_c(j) (biased)

Source: Zheng et al., ICML 2022 (LARA); Veach and Guibas 1995 (balance heuristic).
"""

import numpy as np

from .pairs import repeat_heads
from .softmax_attention import log_softmax_sum, softmax_scale


def existing(counts, batch, landmarks):
    """[B, C] bool."""
    return np.ones((batch, landmarks), bool) if counts is None else np.asarray(counts) > 0


def sample_noise(noise, antithetic, dtype):
    """[B | 1, H, J, D]: antithetic noise has J / 2 rows, the second half of the samples takes the negated ones."""
    noise = np.asarray(noise).astype(dtype)
    return np.concatenate([noise, -noise], axis=2) if antithetic else noise


def own(landmarks, samples):
    """c(j) [J]."""
    return np.arange(samples) % landmarks if landmarks else np.zeros(0, int)


def samples_and_logits(q_bar, k_bar, noise, scale, noise_std, antithetic, counts, dtype):
    """-> mu [B, H, C, D], w [B, H, J, D], l [B, H, J, C] (-inf where landmark c does not exist), c(j)."""
    exists = existing(counts, q_bar.shape[0], q_bar.shape[2])
    mu = np.asarray(q_bar).astype(dtype) + repeat_heads(np.asarray(k_bar).astype(dtype), q_bar.shape[1])
    mu = np.where(exists[:, None, :, None], mu, dtype(0))
    w = mu
    if noise is not None:
        noise = sample_noise(noise, antithetic, dtype)
        w = mu[:, :, own(mu.shape[2], noise.shape[2])] + dtype(noise_std) * noise
    logits = scale * (w @ mu.swapaxes(-1, -2)) - scale / 2 * (mu * mu).sum(axis=-1)[:, :, None, :]
    return mu, w, np.where(exists[:, None, None, :], logits, dtype(-np.inf)), own(mu.shape[2], w.shape[2])


def mixture_proposals(
    q_bar, k_bar, noise=None, *, scale=None, noise_std=1.0, antithetic=False, mis="opt", counts=None, dtype=np.float64
):
    """q_bar [B, H, C, D], k_bar [B, Hkv, C, D] -> w, keys (None unless biased), log_density, balance (None unless opt).

    Landmarks that do not exist count as zero vectors in w and keys.
    """
    scale = softmax_scale(scale, q_bar.shape[-1], dtype)
    mu, w, logits, c = samples_and_logits(q_bar, k_bar, noise, scale, noise_std, antithetic, counts, dtype)
    _, mixture = log_softmax_sum(logits)
    at_own = logits[..., np.arange(len(c)), c]
    missing = np.isneginf(at_own)
    density = np.where(missing, dtype(np.inf), at_own if mis == "opt" else mixture)
    balance = np.exp(np.where(missing, dtype(-np.inf), at_own) - np.where(missing, dtype(0), mixture))
    balance = balance / dtype(len(c) // max(mu.shape[2], 1) or 1)
    return w, w + mu[:, :, c] if mis == "biased" else None, density, balance if mis == "opt" else None


def mixture_proposals_bwd(
    q_bar, k_bar, noise=None, *, dw=None, dkeys=None, dlog_density=None, dbalance=None, scale=None, noise_std=1.0,
    antithetic=False, mis="opt", counts=None, dtype=np.float64,
):  # fmt: skip
    """-> dmu [B, H, C, D]; noise is a constant, landmarks that do not exist get 0."""
    scale = softmax_scale(scale, q_bar.shape[-1], dtype)
    mu, w, logits, c = samples_and_logits(q_bar, k_bar, noise, scale, noise_std, antithetic, counts, dtype)
    share, mixture = log_softmax_sum(logits)
    j, exists = np.arange(len(c)), ~np.isneginf(logits[..., np.arange(len(c)), c])
    zero = np.zeros(logits.shape[:3], dtype)
    ddensity = zero if dlog_density is None else np.where(exists, np.asarray(dlog_density).astype(dtype), dtype(0))
    dlogits = np.zeros_like(logits)
    if mis == "opt":
        balance = share[..., j, c] / dtype(len(c) // max(mu.shape[2], 1) or 1)
        log_balance = zero if dbalance is None else np.where(exists, balance * np.asarray(dbalance), dtype(0))
        dlogits[..., j, c] = ddensity + log_balance
        dlogits -= log_balance[..., None] * share
    else:
        dlogits = ddensity[..., None] * share
    dlogits = dlogits.astype(dtype)
    dsample = scale * dlogits @ mu
    dmu = scale * (dlogits.swapaxes(-1, -2) @ w - dlogits.sum(axis=2)[..., None] * mu)
    for given, times in ((dw, 1), (dkeys, 2)):  # keys = w + mu_c(j), and w contains mu_c(j) itself
        if given is not None:
            dsample = dsample + dtype(times) * np.asarray(given).astype(dtype)
    for i, landmark in enumerate(c):
        dmu[:, :, landmark] += dsample[:, :, i]
    return np.where(existing(counts, *mu.shape[:3:2])[:, None, :, None], dmu, dtype(0))
