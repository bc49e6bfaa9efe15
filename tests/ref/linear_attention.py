"""Attention with a kernel that factors, as the masked quadratic form of its recurrence.

    out_n = sum_m A_nm v_m / sum_m A_nm (normalize=False: not divided),   A_nm = c_tm <phi(q_n), phi(k_m)> e^{weight_m}

with t = n + (M - N) (causal) or M - 1, and c_tm the product of the gates or decays of the tokens m + 1 .. t, times
1 - g_m if gated. A state (S, z, shift) is a set of F more keys: key f has the feature e_f, the value S_f and, in the
denominator, the count z_f. Weights are e^{exponent - row maximum} times a factor, so that nothing over- or underflows.

Source: Katharopoulos et al., ICML 2020; gates: Peng et al., ICLR 2021; decay: Qin et al. 2024.
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, sum_groups, visible_pairs, weighted_sum


def coefficients(batch, heads_kv, seq_k, key_mask, gate, decay, dtype):
    """-> c [B, Hkv, M + 1, M + 1]: row t + 1 behind key t, column m + 1 of key m, row and column 0 what came before;
    and the factors g [B, Hkv, M] that the recurrence c_t = g_t c_{t-1} multiplies by (1 at masked keys)."""
    keep = np.ones((batch, seq_k), bool) if key_mask is None else np.asarray(key_mask, bool)
    given = gate if decay is None else decay
    factors = np.ones((batch, heads_kv, seq_k), dtype)
    if given is not None:
        given = np.asarray(given).astype(dtype)
        given = given[None, :, None] if given.ndim == 1 else given
        factors = np.where(keep[:, None], given, factors)
    new = (dtype(1) - factors if gate is not None else np.ones_like(factors)) * keep[:, None]
    c = np.zeros((batch, heads_kv, seq_k + 1, seq_k + 1), dtype)
    c[:, :, 0, 0] = 1
    for t in range(seq_k):
        c[:, :, t + 1] = factors[:, :, t, None] * c[:, :, t]
        c[:, :, t + 1, t + 1] = new[:, :, t]
    return c, factors


def coefficients_bwd(dc, c, factors, key_mask, gated):
    """The gradient [B, Hkv, M] for gate or decay of a cotangent of c."""
    dc, dfactors = dc.copy(), np.zeros_like(factors)
    for t in reversed(range(factors.shape[-1])):
        earlier = dc[:, :, t + 1, : t + 1]
        dfactors[:, :, t] = (earlier * c[:, :, t, : t + 1]).sum(axis=-1)
        if gated:
            dfactors[:, :, t] -= dc[:, :, t + 1, t + 1]
        dc[:, :, t, : t + 1] += factors[:, :, t, None] * earlier
    return dfactors if key_mask is None else np.where(np.asarray(key_mask, bool)[:, None], dfactors, 0)


class Pairs:
    """Factors and exponents of every (query, key) and (query, state feature) pair, with heads repeated."""

    def __init__(self, fq, fk, v, log_features, key_log_weight, key_mask, is_causal, gate, decay, state, dtype):
        (batch, heads, seq_q, self.features), (heads_kv, seq_k) = fq.shape, fk.shape[1:3]
        self.log, self.weighted = log_features, key_log_weight is not None
        self.fq = np.asarray(fq).astype(dtype)
        self.fk, self.v = (repeat_heads(clear_masked(x, key_mask, dtype), heads) for x in (fk, v))
        self.c, self.factors = coefficients(batch, heads_kv, seq_k, key_mask, gate, decay, dtype)
        time = np.arange(seq_q) + seq_k - seq_q if is_causal else np.full(seq_q, seq_k - 1)
        self.rows = np.maximum(time + 1, 0)  # row of c for query n
        rows = repeat_heads(self.c, heads)[:, :, self.rows]
        self.c_keys, self.c_state = rows[..., 1:], rows[..., :1] * (time >= -1 if is_causal else 1 + 0 * time)[:, None]
        self.seen = np.broadcast_to(visible_pairs(batch, seq_q, seq_k, key_mask, None, is_causal), self.c_keys.shape)
        log_weight = dtype(0)
        if self.weighted:
            log_weight = repeat_heads(np.asarray(key_log_weight).astype(dtype), heads)[:, :, None, :]
        free, factors = log_weight, dtype(1)  # the exponent without c
        if log_features:
            logs = self.fq[:, :, :, None, :] + self.fk[:, :, None, :, :]  # [B, H, N, M, F]
            top = logs.max(axis=-1, keepdims=True, initial=-np.inf)
            top = np.where(np.isneginf(top), dtype(0), top)
            self.mix = np.exp(logs - top)  # which feature makes a pair's weight
            total = self.mix.sum(axis=-1, keepdims=True)
            self.mix = np.divide(self.mix, total, out=np.zeros_like(self.mix), where=total != 0)
            with np.errstate(divide="ignore"):
                free = free + (top + np.log(total))[..., 0]
        else:
            factors = self.fq @ self.fk.swapaxes(-1, -2)
        self.free = np.where(self.seen, free, dtype(-np.inf))
        self.products = np.where(self.seen, factors, dtype(0))
        self.read_state(state, heads, dtype)
        self.scale_rows(dtype)

    def read_state(self, state, heads, dtype):
        shape = *self.fq.shape[:3], self.features
        self.s = np.zeros((*shape[:2], shape[3], self.v.shape[-1]), dtype)
        self.z = np.zeros((*shape[:2], shape[3]), dtype)
        self.state_free, self.state_products = np.full(shape, -np.inf, dtype), np.zeros(shape, dtype)
        if state is None:
            return
        self.s, self.z, shift = (None if x is None else repeat_heads(np.asarray(x).astype(dtype), heads) for x in state)
        zero = np.zeros_like(self.fq)
        self.state_free = (self.fq if self.log else zero) + (dtype(0) if shift is None else shift[:, :, None, :])
        self.state_products = np.ones_like(self.fq) if self.log else self.fq

    def parts(self):
        return (self.c_keys, self.free), (self.c_state, self.state_free)

    def scale_rows(self, dtype):
        """Weights of keys [B, H, N, M] and of state features [B, H, N, F], both over e^{top_n}."""
        self.top = np.zeros((*self.fq.shape[:3], 1), dtype)
        if self.log or self.weighted:
            with np.errstate(divide="ignore"):
                exponents = [np.log(np.abs(c)) + free for c, free in self.parts()]
            top = np.maximum(*(x.max(axis=-1, keepdims=True, initial=-np.inf) for x in exponents))
            self.top = np.where(np.isneginf(top), dtype(0), top)
        self.units = [np.where(c != 0, c * np.exp(free - self.top), dtype(0)) for c, free in self.parts()]
        self.key_weights = np.where(self.units[0] != 0, self.products * self.units[0], dtype(0))
        self.state_weights = np.where(self.units[1] != 0, self.state_products * self.units[1], dtype(0))

    def sums(self):
        numerator = weighted_sum(self.key_weights, self.v) + weighted_sum(self.state_weights, self.s)
        return numerator, (self.key_weights.sum(axis=-1) + (self.state_weights * self.z[:, :, None]).sum(-1))[..., None]


def linear_attention(
    fq, fk, v, *, is_causal=False, normalize=True, log_features=False, key_log_weight=None, key_mask=None, gate=None,
    decay=None, state=None, return_state=False, dtype=np.float64,
):  # fmt: skip
    """fq [B, H, N, F], fk [B, Hkv, M, F], v [B, Hkv, M, E] -> [B, H, N, E] (, (S, z, shift))."""
    p = Pairs(fq, fk, v, log_features, key_log_weight, key_mask, is_causal, gate, decay, state, dtype)
    numerator, total = p.sums()
    out = np.divide(numerator, total, out=np.zeros_like(numerator), where=total != 0) if normalize else numerator
    return (out, new_state(fk, v, log_features, key_log_weight, key_mask, p.c, state, dtype)) if return_state else out


def new_state(fk, v, log_features, key_log_weight, key_mask, c, state, dtype):
    """(S, z, shift): S_f = sum_m c_m phi_f(k_m) e^{weight_m - shift_f} v_m, shift_f the largest exponent or None."""
    fk, v = clear_masked(fk, key_mask, dtype), clear_masked(v, key_mask, dtype)
    with np.errstate(divide="ignore"):
        exponents = np.log(c[:, :, -1, 1:, None]) + (fk if log_features else np.zeros_like(fk))
        before = np.log(c[:, :, -1, :1]) + np.zeros_like(fk[:, :, 0, :] if fk.shape[2] else fk.sum(axis=2))
    if key_log_weight is not None:
        exponents = exponents + np.where(c[:, :, -1, 1:] != 0, key_log_weight, dtype(0)).astype(dtype)[..., None]
    s = z = dtype(0)
    if state is None:
        before = np.full_like(before, -np.inf)
    else:
        s, z = np.asarray(state[0]).astype(dtype), np.asarray(state[1]).astype(dtype)
        before = before if state[2] is None else before + np.asarray(state[2]).astype(dtype)
    top = np.maximum(before, exponents.max(axis=2, initial=-np.inf))
    shifted = log_features or key_log_weight is not None
    used = np.where(np.isneginf(top), dtype(0), top) if shifted else np.zeros_like(top)
    weights = np.exp(exponents - used[:, :, None]) * (dtype(1) if log_features else fk)
    old = np.exp(before - used)
    s = old[..., None] * s + weighted_sum(weights.swapaxes(-1, -2), v)
    return s, old * z + weights.sum(axis=2), top if shifted else None


def linear_attention_bwd(
    dout, fq, fk, v, *, is_causal=False, normalize=True, log_features=False, key_log_weight=None, key_mask=None,
    gate=None, decay=None, state=None, dtype=np.float64,
):  # fmt: skip
    """-> dfq, dfk, dv [, dkey_log_weight] [, dgate] [, ddecay]; the state that came in is a constant.

    With d_n the sum of weights: dA_nm = <dout_n, v_m - out_n> / d_n,   dv_m = sum_n A_nm / d_n dout_n.
    """
    heads_kv = fk.shape[1]
    p = Pairs(fq, fk, v, log_features, key_log_weight, key_mask, is_causal, gate, decay, state, dtype)
    dout = np.asarray(dout).astype(dtype)
    mean, inverse = np.zeros_like(dout), np.ones((*dout.shape[:3], 1), dtype)
    if normalize:
        numerator, total = p.sums()
        inverse = np.divide(dtype(1), total, out=np.zeros_like(total), where=total != 0)
        mean = numerator * inverse
    g = dout * inverse
    r = (g * mean).sum(axis=-1, keepdims=True)
    dkeys = np.where(p.seen, g @ p.v.swapaxes(-1, -2) - r, dtype(0))
    dstate = g @ p.s.swapaxes(-1, -2) - r * p.z[:, :, None]
    dv = p.key_weights.swapaxes(-1, -2) @ g
    dlogs = np.where(p.key_weights != 0, dkeys * p.key_weights, dtype(0))
    if log_features:
        dfq = (dlogs[..., None] * p.mix).sum(axis=3) + dstate * p.state_weights
        dfk = (dlogs[..., None] * p.mix).sum(axis=2)
    else:
        dproducts = dkeys * p.units[0]
        dfq = dproducts @ p.fk + dstate * p.units[1]
        dfk = dproducts.swapaxes(-1, -2) @ p.fq
    gradients = [dfq, sum_groups(dfk, heads_kv), sum_groups(dv, heads_kv)]
    if key_log_weight is not None:
        gradients.append(sum_groups(dlogs.sum(axis=2), heads_kv))
    if gate is not None or decay is not None:
        gradients.append(factors_bwd(p, dkeys, dstate, key_mask, gate is not None, heads_kv))
    if decay is not None and np.ndim(decay) == 1:
        gradients[-1] = gradients[-1].sum(axis=(0, 2))
    return tuple(gradients)


def factors_bwd(p, dkeys, dstate, key_mask, gated, heads_kv):
    """dgate or ddecay [B, Hkv, M] by way of dc, the weights being c times what does not depend on it."""
    dc = np.zeros_like(p.c)
    dc_keys = sum_groups(dkeys * p.products * np.exp(p.free - p.top), heads_kv)
    dc_state = sum_groups((dstate * p.state_products * np.exp(p.state_free - p.top)).sum(axis=-1), heads_kv)
    for n, row in enumerate(p.rows):
        dc[:, :, row, 1:] += dc_keys[:, :, n]
        dc[:, :, row, 0] += dc_state[:, :, n]
    return coefficients_bwd(dc, p.c, p.factors, key_mask, gated)
