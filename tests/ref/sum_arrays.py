"""out[b,h,n,:] = sum_i factor_i sum_{b',h'} term_i[b',h',n,:], over the items and heads that fall on b and h."""

import numpy as np


def sum_arrays(terms, factors=None, *, batch=None, heads=None, dtype=np.float64):
    """terms: arrays [B_i, H_i, N, D], B_i = B or B = 1, H_i a multiple of H -> [B, H, N, D]."""
    factors = [1] * len(terms) if factors is None else factors
    batch = terms[0].shape[0] if batch is None else batch
    heads = terms[0].shape[1] if heads is None else heads
    total = dtype(0)
    for x, factor in zip(terms, factors, strict=True):
        x = np.asarray(x).astype(dtype)
        x = x if x.shape[0] == batch else x.sum(axis=0, keepdims=True)
        total = total + dtype(factor) * x.reshape(batch, heads, -1, *x.shape[2:]).sum(axis=2)
    return total
