"""LARA as the ratio of two sums over samples w_j of proposals g_c = N(mu_c, 1 / s), c(j) = j mod C.

    out_n = sum_j alpha_nj p_n(w_j) / g(w_j) f(w_j) / sum_j alpha_nj p_n(w_j) / g(w_j)
    p_n(w) = N(w) e^{s <w, q_n> - s |q_n|^2 / 2} sum_m e^{s <w, k_m> - s |k_m|^2 / 2},   mu_c = q_bar_c + k_bar_c
    opt: alpha_nj = max(1e-8, B_j + coeff (t_nc - mean_c' t_nc')), g = g_c(j);   bh: alpha = 1, g = sum_c g_c
    biased: alpha_nj = e^{s <mu_c, q_n>}, g = sum_c g_c

Source: Zheng et al., ICML 2022. Exponents stay logarithms until the largest of a row is subtracted.
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, sum_groups, weighted_sum
from .randomized_attention import noise_factor
from .segment_mean import segment_mean, segment_mean_bwd
from .softmax_attention import log_softmax_sum, softmax_from, softmax_scale

FLOOR = 1e-8


class Lara:
    """Everything between the arguments and the output; what belongs to a sample has axes [B, H, J, ...]."""

    def __init__(
        self, q, k, v, num_landmarks, landmarks, mis, alpha_coeff, t_norm, antithetic, noise, noise_std, scale,
        key_mask, query_mask, dtype,
    ):  # fmt: skip
        (batch, heads, seq_q, dim), seq_k = q.shape, k.shape[2]
        self.s, self.mis, self.coeff, self.t_norm, self.dtype = (
            softmax_scale(scale, dim, dtype), mis, dtype(alpha_coeff), t_norm, dtype,
        )  # fmt: skip
        self.kept = np.ones((batch, seq_q), bool) if query_mask is None else np.asarray(query_mask, bool)
        self.valid = np.ones((batch, seq_k), bool) if key_mask is None else np.asarray(key_mask, bool)
        self.q = clear_masked(q, query_mask, dtype)
        self.k, self.v = (repeat_heads(clear_masked(x, key_mask, dtype), heads) for x in (k, v))
        self.means_q = dict(num_segments=min(num_landmarks, seq_q, seq_k), mask=query_mask, paired_mask=key_mask)
        self.means_k = dict(num_segments=min(num_landmarks, seq_q, seq_k), mask=key_mask, paired_mask=query_mask)
        if landmarks is None:
            q_bar, counts = segment_mean(q, return_counts=True, dtype=dtype, **self.means_q)
            k_bar, exists = segment_mean(k, dtype=dtype, **self.means_k), counts > 0
        else:
            q_bar, k_bar = (np.asarray(x).astype(dtype) for x in landmarks)
            exists = np.ones((batch, q_bar.shape[2]), bool)
        self.exists = exists[:, None, None, :]  # [B, 1, 1, C]
        self.q_bar, self.mu = q_bar, q_bar + repeat_heads(k_bar, heads)
        self.w = self.mu
        count = self.mu.shape[2]
        if noise is not None:
            noise = np.asarray(noise).astype(dtype)
            noise = np.concatenate([noise, -noise], axis=2) if antithetic else noise
            own = np.arange(noise.shape[2]) % count if count else np.zeros(0, int)
            self.w = self.mu[:, :, own] + dtype(noise_factor(noise_std, self.s)) * noise
        self.own = np.arange(self.w.shape[2]) % count if count else np.zeros(0, int)
        self.rounds = dtype(len(self.own) // count if count else 1)
        self.first_stage()
        self.ratio()

    def log_density(self, x, valid):
        """s <w_j, x> - s |x|^2 / 2 [B, H, J, .], the logarithm of N(w; x) / N(w); -inf where x is not valid."""
        logits = self.s * (self.w @ x.swapaxes(-1, -2)) - self.s / 2 * (x * x).sum(axis=-1)[:, :, None, :]
        return np.where(valid, logits, self.dtype(-np.inf))

    def first_stage(self):
        self.lk = self.log_density(self.k, self.valid[:, None, None, :])
        p, self.mass = log_softmax_sum(self.lk)
        self.f = weighted_sum(p, self.v)  # f(w_j)
        self.lm = self.log_density(self.mu, self.exists)
        self.share, self.mixture = log_softmax_sum(self.lm)

    def weights(self):
        """-> log alpha [B, H, N, J]."""
        if self.mis == "bh":
            return np.zeros((1, 1, 1, len(self.own)), self.dtype)
        if self.mis == "biased":
            return self.s * (self.q @ self.mu.swapaxes(-1, -2))[..., self.own]
        kept = self.kept[:, None, :, None]
        x = np.where(kept & self.exists, self.s * (self.q @ self.q_bar.swapaxes(-1, -2)), self.dtype(-np.inf))
        self.over = -1 if self.t_norm == "landmark" else 2
        self.t = log_softmax_sum(x.swapaxes(self.over, -1))[0].swapaxes(self.over, -1)
        self.landmarks = np.maximum(self.exists.sum(axis=-1, keepdims=True), 1).astype(self.dtype)
        centred = self.t - self.t.sum(axis=-1, keepdims=True) / self.landmarks
        self.balance = self.share[..., np.arange(len(self.own)), self.own] / self.rounds
        self.alpha = self.balance[:, :, None, :] + self.coeff * centred[..., self.own]
        return np.log(np.maximum(self.alpha, self.dtype(FLOOR)))

    def ratio(self):
        """Logits of the samples [B, H, N, J] and the output."""
        proposal = self.lm[..., np.arange(len(self.own)), self.own] if self.mis == "opt" else self.mixture
        used = self.exists[:, :, 0, self.own]
        target = self.mass - np.where(used, proposal, self.dtype(0))
        lq = self.s * (self.q @ self.w.swapaxes(-1, -2)) - self.s / 2 * (self.q * self.q).sum(axis=-1)[..., None]
        seen = used[:, :, None, :] & self.kept[:, None, :, None]
        self.logits = np.where(seen, self.weights() + lq + target[:, :, None, :], self.dtype(-np.inf))
        p, self.lse = log_softmax_sum(self.logits)
        self.out = weighted_sum(p, self.f)

    def sum_own(self, x):
        """x [..., J] -> [..., C]: the sum over the samples of each landmark."""
        return np.stack([x[..., self.own == c].sum(axis=-1) for c in range(self.mu.shape[2])], axis=-1)

    def backward(self, dout):
        """-> dq, dk, dv, dq_bar, dk_bar, all with as many heads as q."""
        s, k, w, mu, count = self.s, self.k, self.w, self.mu, self.mu.shape[2]
        p1, p2 = softmax_from(self.lk, self.mass), softmax_from(self.logits, self.lse)
        df = p2.swapaxes(-1, -2) @ dout
        dz = p2 * (dout @ self.f.swapaxes(-1, -2) - (dout * self.out).sum(axis=-1, keepdims=True))
        r = dz.sum(axis=2)
        dq = s * (dz @ w)
        dw = s * (dz.swapaxes(-1, -2) @ self.q)
        dlk = p1 * (df @ self.v.swapaxes(-1, -2) - (df * self.f).sum(axis=-1, keepdims=True) + r[..., None])
        dv = p1.swapaxes(-1, -2) @ df
        dw = dw + s * (dlk @ k)
        dk = s * (dlk.swapaxes(-1, -2) @ w - dlk.sum(axis=2)[..., None] * k)
        dmu, dq_bar = np.zeros_like(mu), np.zeros_like(mu)
        if self.mis == "opt":
            free = self.alpha > self.dtype(FLOOR)
            da = np.divide(dz, self.alpha, out=np.zeros_like(dz), where=free & (dz != 0))
            b = self.balance * da.sum(axis=2)
            dlm = -b[..., None] * self.share
            dlm[..., np.arange(len(self.own)), self.own] += b - r
            dt = self.coeff * self.sum_own(da)
            dt = np.where(self.exists, dt - dt.sum(axis=-1, keepdims=True) / self.landmarks, self.dtype(0))
            dlt = self.t * (dt - (dt * self.t).sum(axis=self.over, keepdims=True))
            dq_bar = s * (dlt.swapaxes(-1, -2) @ self.q)
            dq = dq + s * (dlt @ self.q_bar)
        else:
            dlm = -r[..., None] * self.share
            if self.mis == "biased":
                dla = self.sum_own(dz)
                dmu = s * (dla.swapaxes(-1, -2) @ self.q)
                dq = dq + s * (dla @ mu)
        dw = dw + s * (dlm @ mu)
        dmu = dmu + s * (dlm.swapaxes(-1, -2) @ w - dlm.sum(axis=2)[..., None] * mu)
        dmu = dmu + np.stack([dw[:, :, self.own == c].sum(axis=2) for c in range(count)], axis=2) if count else dmu
        return dq, dk, dv, dq_bar + dmu, dmu


def lara_attention(
    q, k, v, *, num_landmarks=49, landmarks=None, mis="opt", alpha_coeff=1.0, t_norm="query", antithetic=False,
    noise=None, noise_std="exact", scale=None, key_mask=None, query_mask=None, dtype=np.float64,
):  # fmt: skip
    """landmarks (q_bar [B, H, C, D], k_bar [B, Hkv, C, D]), noise [1 | B, H, J, D], J / 2 rows if antithetic."""
    arguments = num_landmarks, landmarks, mis, alpha_coeff, t_norm, antithetic, noise, noise_std, scale
    return Lara(q, k, v, *arguments, key_mask, query_mask, dtype).out


def lara_attention_bwd(
    dout, q, k, v, *, num_landmarks=49, landmarks=None, mis="opt", alpha_coeff=1.0, t_norm="query", antithetic=False,
    noise=None, noise_std="exact", scale=None, key_mask=None, query_mask=None, dtype=np.float64,
):  # fmt: skip
    """-> dq, dk, dv [, dq_bar, dk_bar if landmarks are given]; the noise is a constant."""
    arguments = num_landmarks, landmarks, mis, alpha_coeff, t_norm, antithetic, noise, noise_std, scale
    lara = Lara(q, k, v, *arguments, key_mask, query_mask, dtype)
    dq, dk, dv, dq_bar, dk_bar = lara.backward(clear_masked(dout, query_mask, dtype))
    dk, dv, dk_bar = (sum_groups(x, k.shape[1]) for x in (dk, dv, dk_bar))
    if landmarks is not None:
        return dq, dk, dv, dq_bar, dk_bar
    dq = segment_mean_bwd(dq_bar, q.shape[2], base=dq, dtype=dtype, **lara.means_q)
    return dq, segment_mean_bwd(dk_bar, k.shape[2], base=dk, dtype=dtype, **lara.means_k), dv
