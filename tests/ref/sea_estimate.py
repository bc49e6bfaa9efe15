"""The estimator of SEA: linear attention of positions and values, an encoder, a convolutional decoder, a softmax.

    C_t = (phi(q_t) sum_j phi(k_j) [P_j | v_j]^T) / (phi(q_t) sum_j (phi(k_j) + eps)),   Z_t = GELU(LN(enc [C_t | v_t]))
    row_scale_t, mix_t = sigmoid(scaler Z_t),   probs_t = softmax(decoder(row linear Z)_t)

With u = d^{-1/4} W x, causal: phi = max(u, 0) + 1e-3, j <= t, eps = 1e-6 (once, behind the sum), P_t = position_t.
Else phi = (e^{u - |x|^2 / (2 sqrt(d)) - c} + 1e-4) / sqrt(m), c the largest u of a query's features, or of all features
of all keys, eps = 0, P_t = the identity matrix at row t (d - 1) / (T - 1), interpolated. An item is its valid tokens
alone: everything that counts tokens counts these.
Source: Lee et al., ICLR 2024, section 3.1, and the code published with it.
"""

import numpy as np

from .sea_layers import (
    area_resize,
    bilinear_resize,
    convolution,
    gelu,
    layer_norm,
    linear,
    relu,
    sigmoid,
    softmax,
)


def relu_features(x, projection):
    """[H, T, d] -> [H, T, m]."""
    return relu(x.dtype.type(x.shape[-1] ** -0.25) * (x @ projection.T)) + x.dtype.type(1e-3)


def exp_features(x, projection, axes):
    """axes: over which c is the largest u: the features of a query, the features and tokens of keys."""
    u = x.dtype.type(x.shape[-1] ** -0.25) * (x @ projection.T)
    half = (x * x).sum(axis=-1, keepdims=True) / x.dtype.type(2 * x.shape[-1] ** 0.5)
    e = np.exp(u - half - u.max(axis=axes, keepdims=True)) + x.dtype.type(1e-4)
    return e / x.dtype.type(len(projection) ** 0.5)


def identity_rows(count, dim, dtype):
    """[T, d]: row t is the identity matrix at p = t (d - 1) / (T - 1), between rows floor(p) and floor(p) + 1."""
    rows, span = np.zeros((count, dim + 1), dtype), max(count - 1, 1)
    for t in range(count):
        low, rest = divmod(t * (dim - 1), span)
        rows[t, low], rows[t, low + 1] = dtype(1 - rest / span), dtype(rest / span)
    return rows[:, :dim]


def causal_context(q, k, values, w, s, z):
    """Rows C_t [H, T, 2d] and the new sums."""
    fq, fk = relu_features(q, w["projection"]), relu_features(k, w["projection"])
    out = np.zeros_like(values)
    for t in range(q.shape[1]):
        s = s + fk[:, t, :, None] * values[:, t, None, :]
        z = z + fk[:, t]
        denominator = (fq[:, t] * (z + z.dtype.type(1e-6))).sum(axis=-1, keepdims=True)
        out[:, t] = (fq[:, t, None] @ s)[:, 0] / denominator
    return out, s, z


def whole_context(q, k, values, w):
    fq, fk = exp_features(q, w["projection"], (2,)), exp_features(k, w["projection"], (1, 2))
    return fq @ (fk.swapaxes(1, 2) @ values) / (fq @ fk.sum(axis=1)[:, :, None])


def causal_decoder(rows, w, rows1, rows2):
    """rows [C, T, K / 4] of the row linear -> scores [H, T, K] and the last four rows before either convolution."""
    no_padding = dict(dilation=2, before=0, after=0)
    first = np.concatenate([rows1, layer_norm(rows, w["row_norm_weight"], w["row_norm_bias"])], axis=1)
    second = relu(convolution(first, w["conv1_weight"], w["conv1_bias"], **no_padding))
    second = np.concatenate([rows2, second], axis=1)
    y = relu(convolution(second, w["conv2_weight"], w["conv2_bias"], **no_padding))
    y = np.pad(np.repeat(y, 4, axis=-1), ((0, 0), (0, 0), (1, 1)))
    y = np.einsum("oi,itc->otc", w["out_weight"], y) + w["out_bias"][:, None, None]
    y = layer_norm(area_resize(y, y.shape[-1] - 2), w["norm_weight"], w["norm_bias"])
    return y, first[:, -4:], second[:, -4:]


def whole_decoder(rows, w):
    """rows [C, T, K / 2] of the row linear -> scores [H, T, K]."""
    y = relu(convolution(rows, w["conv1_weight"], w["conv1_bias"], stride=2))
    y = relu(convolution(y, w["conv2_weight"], w["conv2_bias"]))
    y = convolution(np.repeat(y, 2, axis=1), w["out_weight"], w["out_bias"])
    return bilinear_resize(bilinear_resize(y, rows.shape[1], 1), 2 * rows.shape[2], 2)


def estimate_item(q, k, v, w, is_causal, state):
    """q, k, v [H, T, d] of the valid tokens -> probs [H, T, K], row_scale, mix [H, T], the new state."""
    (heads, count, dim), dtype = q.shape, q.dtype.type
    s, z, rows1, rows2, before = state
    if is_causal:
        positions = w["position"][before : before + count]
        assert len(positions) == count
    else:
        positions = identity_rows(count, dim, dtype)
    values = np.concatenate([np.broadcast_to(positions, (heads, count, dim)), v], axis=-1)
    if is_causal:
        context, s, z = causal_context(q, k, values, w, s, z)
    else:
        context = whole_context(q, k, values, w)
    x = linear(np.concatenate([context, v], axis=-1), w["encoder_weight"], w["encoder_bias"])
    x = gelu(layer_norm(x, w["encoder_norm_weight"], w["encoder_norm_bias"]))
    scales = sigmoid(linear(x, w["scaler_weight"], w["scaler_bias"]))
    splits = 2 if is_causal else 4
    rows = linear(x, w["row_weight"], w["row_bias"]).reshape(heads, count, splits, -1)
    rows = rows.swapaxes(1, 2).reshape(heads * splits, count, -1)
    if is_causal:
        scores, rows1, rows2 = causal_decoder(rows, w, rows1, rows2)
    else:
        scores = whole_decoder(rows, w)
    return softmax(scores), scales[..., 0], scales[..., 1], (s, z, rows1, rows2, before + count)


def no_state(batch, heads, dim, w, dtype):
    features, channels, width = len(w["projection"]), len(w["conv1_bias"]), len(w["row_bias"]) // 2
    rows = np.zeros((batch, channels, 4, width), dtype)
    sums = np.zeros((batch, heads, features, 2 * dim), dtype), np.zeros((batch, heads, features), dtype)
    return *sums, rows, rows.copy(), np.zeros(batch, np.int32)


def sea_estimate(q, k, v, weights, *, is_causal=False, key_mask=None, state=None, return_state=False, dtype=np.float64):
    """q, k, v [B, H, N, d] -> probs [B, H, N, K], row_scale, mix [B, H, N] (, state)."""
    w = {name: np.asarray(x).astype(dtype) for name, x in weights.items()}
    q, k, v = (np.asarray(x).astype(dtype) for x in (q, k, v))
    batch, heads, seq, dim = q.shape
    splits, times = (2, 4) if is_causal else (4, 2)
    columns = len(w["row_bias"]) // splits * times
    probs, (row_scale, mix) = np.zeros((batch, heads, seq, columns), dtype), np.zeros((2, batch, heads, seq), dtype)
    state = no_state(batch, heads, dim, w, dtype) if state is None else tuple(np.array(x) for x in state)
    state = *(x.astype(dtype) for x in state[:4]), state[4].astype(np.int32)
    for b in range(batch):
        kept = np.arange(seq) if key_mask is None else np.nonzero(np.asarray(key_mask, bool)[b])[0]
        if len(kept):
            items = [x[b][:, kept] for x in (q, k, v)]
            results = estimate_item(*items, w, is_causal, [x[b] for x in state])
            probs[b][:, kept], row_scale[b][:, kept], mix[b][:, kept] = results[:3]
            for whole, part in zip(state, results[3], strict=True):
                whole[b] = part
    return (probs, row_scale, mix, state) if return_state else (probs, row_scale, mix)
