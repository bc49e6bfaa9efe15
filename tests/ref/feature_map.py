"""Feature maps: E_w <phi(x), phi(y)> = e^{s <x, y>} for positive, hyperbolic and (with its factor) trig features.

Source: Choromanski et al., ICLR 2021 (positive, hyperbolic, relu), Rahimi and Recht 2007 and Peng et al., ICLR 2021
(trig), Katharopoulos et al., ICML 2020 (elu). With a_i = <w_i, x~>, n = |x~|^2 / 2, x~ = sqrt(s) x:

    positive e^{a - n} / sqrt(F)        hyperbolic [e^{a - n}, e^{-a - n}] / sqrt(2 F)
    trig [sin a, cos a] / sqrt(F), log_factor n        relu max(0, a) + 1e-3 / sqrt(F)        elu x + 1 or e^x
"""

import numpy as np

from .pairs import clear_masked
from .softmax_attention import softmax_scale


def projected(x, projection, scale, dtype):
    """-> x~ [B, H, N, D], the rows of every head [H, F, D], a [B, H, N, F], n [B, H, N, 1]."""
    scaled = np.sqrt(softmax_scale(scale, x.shape[-1], dtype)) * np.asarray(x).astype(dtype)
    rows = np.asarray(projection).astype(dtype)
    rows = rows[None] if rows.ndim == 2 else rows
    rows = np.repeat(rows, x.shape[1] // rows.shape[0], axis=0)
    return scaled, rows, scaled @ rows.swapaxes(-1, -2), (scaled * scaled).sum(axis=-1, keepdims=True) / dtype(2)


def feature_map(
    x, projection=None, features="positive", *, scale=None, log=False, mask=None, return_log_factor=False,
    dtype=np.float64,
):  # fmt: skip
    """x [B, H, N, D], projection [F, D] or [Hp, F, D] -> [B, H, N, F'] (, log_factor [B, H, N]).

    A masked token gives 0, its logarithms are -inf.
    """
    x, kept = clear_masked(x, mask, dtype), True if mask is None else np.asarray(mask, bool)[:, None, :, None]
    if features == "elu":
        return np.where(kept, np.where(x > 0, x + dtype(1), np.exp(np.minimum(x, dtype(0)))), dtype(0))
    _, rows, a, n = projected(x, projection, scale, dtype)
    count = rows.shape[1]
    if features in ("positive", "hyperbolic"):
        out = a - n if features == "positive" else np.concatenate([a - n, -a - n], axis=-1)
        out = np.where(kept, out, dtype(-np.inf))
        return out if log else np.exp(out) / dtype(np.sqrt(out.shape[-1]))
    if features == "relu":
        return np.where(kept, np.maximum(a, dtype(0)) + dtype(1e-3 / np.sqrt(count)), dtype(0))
    assert features == "trig"
    out = np.where(kept, np.concatenate([np.sin(a), np.cos(a)], axis=-1) / dtype(np.sqrt(count)), dtype(0))
    return (out, np.where(kept, n, dtype(-np.inf))[..., 0]) if return_log_factor else out


def feature_map_bwd(
    dout, x, projection=None, features="positive", *, scale=None, log=False, mask=None, dlog_factor=None,
    dtype=np.float64,
):  # fmt: skip
    """-> dx [, dprojection if a projection is given]; a masked token gives 0 to both."""
    dout, x = clear_masked(dout, mask, dtype), clear_masked(x, mask, dtype)
    if features == "elu":
        return np.where(x > 0, dout, dout * np.exp(np.minimum(x, dtype(0))))
    scaled, rows, a, n = projected(x, projection, scale, dtype)
    root, dn = np.sqrt(dtype(rows.shape[1])), np.zeros_like(n)
    if features in ("positive", "hyperbolic"):
        g = dout if log else dout * feature_map(x, projection, features, scale=scale, dtype=dtype)
        dn = -g.sum(axis=-1, keepdims=True)
        da = g if features == "positive" else g[..., : g.shape[-1] // 2] - g[..., g.shape[-1] // 2 :]
    elif features == "relu":
        da = np.where(a > 0, dout, dtype(0))
    else:
        dsin, dcos = dout[..., : rows.shape[1]], dout[..., rows.shape[1] :]
        da = (dsin * np.cos(a) - dcos * np.sin(a)) / root
        if dlog_factor is not None:
            dn = clear_masked(np.asarray(dlog_factor)[..., None], mask, dtype)
    dx = np.sqrt(softmax_scale(scale, x.shape[-1], dtype)) * (da @ rows + dn * scaled)
    drows = (da.swapaxes(-1, -2) @ scaled).sum(axis=0)
    if np.ndim(projection) == 2:
        return dx, drows.sum(axis=0)
    return dx, drows.reshape(len(projection), -1, *drows.shape[1:]).sum(axis=1)
