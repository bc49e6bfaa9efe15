"""y = x / ||x||_2 over the last axis, lse = ln ||x||; a zero row gives y = 0, lse = -inf and no gradient."""

import numpy as np


def l2_normalize(x, dtype=np.float64):
    """x [..., D] -> y [..., D], lse [...]."""
    x = np.asarray(x).astype(dtype)
    norm = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    y = np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)
    lse = np.log(norm, out=np.full_like(norm, -np.inf), where=norm != 0)
    return y, lse[..., 0]


def l2_normalize_bwd(dy, y, lse, dtype=np.float64):
    """dx = (dy - y <y, dy>) / ||x||."""
    dy, y, lse = (np.asarray(a).astype(dtype) for a in (dy, y, lse))
    tangent = dy - y * (y * dy).sum(axis=-1, keepdims=True)
    norm = np.exp(lse)[..., None]
    return np.divide(tangent, norm, out=np.zeros_like(tangent), where=norm != 0)
