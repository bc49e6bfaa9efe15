"""The softmax over the union of two sets of keys.

lse_n = ln(e^{lse1_n} + e^{lse2_n}),   out_n = e^{lse1_n - lse_n} out1_n + e^{lse2_n - lse_n} out2_n
"""

import numpy as np

from .softmax_attention import log_softmax_sum


def parts(out1, lse1, out2, lse2, dtype):
    """-> outs, weights [..., 1] and lse; a part of weight 0 counts as 0, whatever its out holds."""
    weights, lse = log_softmax_sum(np.stack([np.asarray(x).astype(dtype) for x in (lse1, lse2)], axis=-1))
    weights = weights[..., None, 0], weights[..., None, 1]
    outs = [np.where(w != 0, np.asarray(x).astype(dtype), dtype(0)) for w, x in zip(weights, (out1, out2), strict=True)]
    return outs, weights, lse


def merge_states(out1, lse1, out2, lse2, *, dtype=np.float64):
    """out_i [B, H, N, E], lse_i [B, H, N] -> out [B, H, N, E], lse [B, H, N]."""
    outs, weights, lse = parts(out1, lse1, out2, lse2, dtype)
    return weights[0] * outs[0] + weights[1] * outs[1], lse


def merge_states_bwd(dout, out1, lse1, out2, lse2, *, dlse=None, dtype=np.float64):
    """-> dout1, dlse1, dout2, dlse2.   dout_i = w_i dout,   dlse_i = w_i (<dout, out_i - out> + dlse)."""
    outs, weights, _ = parts(out1, lse1, out2, lse2, dtype)
    out = weights[0] * outs[0] + weights[1] * outs[1]
    dout = np.asarray(dout).astype(dtype)
    dlse = dtype(0) if dlse is None else np.asarray(dlse).astype(dtype)
    gradients = []
    for w, part in zip(weights, outs, strict=True):
        gradients.append(np.where(w != 0, w * dout, dtype(0)))
        g = (dout * (part - out)).sum(axis=-1) + dlse
        gradients.append(np.where(w[..., 0] != 0, w[..., 0] * g, dtype(0)))
    return tuple(gradients)
