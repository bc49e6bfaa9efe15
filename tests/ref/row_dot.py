"""out[b,h,n] = <x[b,h,n,:], y[b,h,n,:] - z[b,h,n,:]>, without z if it is not given."""

import numpy as np


def row_dot(x, y, z=None, *, dtype=np.float64):
    x, y = np.asarray(x).astype(dtype), np.asarray(y).astype(dtype)
    return (x * (y if z is None else y - np.asarray(z).astype(dtype))).sum(axis=-1)
