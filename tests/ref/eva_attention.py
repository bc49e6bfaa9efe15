"""EVA as attention over augmented keys: the tokens of a query's block, and one entry (k_bar_c, beta_c) for every chunk.

    beta_c = softmax over the chunk's valid m of (s <w_c, k_m> - s |k_m|^2 / 2) v,   w_c = mu_c + s^-1/2 noise_c
    out_n = softmax over [block tokens of s <q_n, k_m> ; chunks of s <q_n, k_bar_c> + ln |chunk|] [v ; beta]

Source: Zheng et al., ICLR 2023. Query n stands at position n + (M - N), in block position // window.
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, sum_groups, weighted_sum
from .segment_mean import membership, segment_mean, segment_mean_bwd
from .softmax_attention import log_softmax_sum, softmax_from, softmax_scale


def visible_tokens_and_chunks(seq_q, seq_k, window, chunk_size, partition, is_causal):
    """-> [N, M] and [N, C] bool."""
    position = (np.arange(seq_q) + seq_k - seq_q)[:, None]
    block, tokens = position // window, np.arange(seq_k)
    near = tokens // window == block
    first = np.arange(-(-seq_k // chunk_size)) * chunk_size
    before = first + chunk_size <= block * window
    if is_causal:  # without partition: the chunks before the query's own, so that its block may count twice
        before = before if partition else first // chunk_size < position // chunk_size
        return near & (tokens <= position), before & (position >= 0)
    far = before | (first >= (block + 1) * window)
    return near, far if partition else np.ones_like(far)


class Eva:
    def __init__(
        self, q, k, v, window, chunk_size, landmarks, noise, partition, chunk_mass, scale, key_mask, is_causal, dtype
    ):
        heads, seq_k = q.shape[1], k.shape[2]
        self.s, self.chunk_size, self.key_mask = softmax_scale(scale, q.shape[-1], dtype), chunk_size, key_mask
        self.q = np.asarray(q).astype(dtype)
        k, v = (clear_masked(x, key_mask, dtype) for x in (k, v))
        k_bar, counts = segment_mean(k, segment_size=chunk_size, mask=key_mask, return_counts=True, dtype=dtype)
        mu = k_bar
        if landmarks is not None:
            k_bar, mu = (np.asarray(x).astype(dtype) for x in landmarks)
        self.w = mu if noise is None else mu + self.s ** dtype(-0.5) * np.asarray(noise).astype(dtype)
        member = membership(k.shape[0], seq_k, None, chunk_size, key_mask, None)[:, None]
        x = self.s * (self.w @ k.swapaxes(-1, -2)) - self.s / 2 * (k * k).sum(axis=-1)[:, :, None, :]
        self.members = np.where(member, x, dtype(-np.inf))
        self.k, self.v, self.beta = k, v, weighted_sum(log_softmax_sum(self.members)[0], v)
        near, far = visible_tokens_and_chunks(q.shape[2], seq_k, window, chunk_size, partition, is_causal)
        valid = np.ones((k.shape[0], seq_k), bool) if key_mask is None else np.asarray(key_mask, bool)
        seen = np.concatenate([near & valid[:, None, :], far & (counts > 0)[:, None, :]], axis=-1)[:, None]
        bias = np.log(np.maximum(counts, 1).astype(dtype)) if chunk_mass else np.zeros(counts.shape, dtype)
        bias = np.concatenate([np.zeros((k.shape[0], seq_k), dtype), bias], axis=-1)
        self.keys = repeat_heads(np.concatenate([k, k_bar], axis=2), heads)
        self.values = repeat_heads(np.concatenate([v, self.beta], axis=2), heads)
        logits = self.s * (self.q @ self.keys.swapaxes(-1, -2)) + bias[:, None, None, :]
        self.logits = np.where(seen, logits, dtype(-np.inf))
        self.out = weighted_sum(log_softmax_sum(self.logits)[0], self.values)

    def backward(self, dout):
        """-> dq, dk, dv, dk_bar, dmu."""
        seq_k, heads_kv, s = self.k.shape[2], self.k.shape[1], self.s
        p1, p2 = (softmax_from(x, log_softmax_sum(x)[1]) for x in (self.members, self.logits))
        dx = p2 * (dout @ self.values.swapaxes(-1, -2) - (dout * self.out).sum(axis=-1, keepdims=True))
        dq = s * (dx @ self.keys)
        dkeys = sum_groups(s * (dx.swapaxes(-1, -2) @ self.q), heads_kv)
        dvalues = sum_groups(p2.swapaxes(-1, -2) @ dout, heads_kv)
        dbeta = dvalues[:, :, seq_k:]
        db = p1 * (dbeta @ self.v.swapaxes(-1, -2) - (dbeta * self.beta).sum(axis=-1, keepdims=True))
        dv = dvalues[:, :, :seq_k] + p1.swapaxes(-1, -2) @ dbeta
        dk = dkeys[:, :, :seq_k] + s * (db.swapaxes(-1, -2) @ self.w - db.sum(axis=2)[..., None] * self.k)
        return dq, dk, dv, dkeys[:, :, seq_k:], s * (db @ self.k)


def eva_attention(
    q, k, v, *, window=64, chunk_size=64, landmarks=None, noise=None, partition=True, chunk_mass=True, scale=None,
    key_mask=None, is_causal=False, dtype=np.float64,
):  # fmt: skip
    """landmarks (k_bar, mu) [B, Hkv, C, D] each, noise [1 | B, Hkv, C, D] -> [B, H, N, E]."""
    arguments = window, chunk_size, landmarks, noise, partition, chunk_mass, scale, key_mask, is_causal
    return Eva(q, k, v, *arguments, dtype).out


def eva_attention_bwd(
    dout, q, k, v, *, window=64, chunk_size=64, landmarks=None, noise=None, partition=True, chunk_mass=True, scale=None,
    key_mask=None, is_causal=False, dtype=np.float64,
):  # fmt: skip
    """-> dq, dk, dv [, dk_bar, dmu if landmarks are given]; the noise is a constant."""
    arguments = window, chunk_size, landmarks, noise, partition, chunk_mass, scale, key_mask, is_causal
    eva = Eva(q, k, v, *arguments, dtype)
    dq, dk, dv, dk_bar, dmu = eva.backward(np.asarray(dout).astype(dtype))
    if landmarks is not None:
        return dq, dk, dv, dk_bar, dmu
    means = dict(segment_size=chunk_size, mask=key_mask, dtype=dtype)
    return dq, segment_mean_bwd(dk_bar + dmu, k.shape[2], base=dk, **means), dv
