"""Tokens grouped by code: a stable counting sort of every hash."""

import numpy as np


def bucket_sort(codes, num_buckets, mask=None):
    """codes [B, H, R, N], mask [B, N] -> order [B, H, R, N] int32, offsets [B, H, R, num_buckets + 1] int32.

    order[offsets[c]] .. order[offsets[c + 1] - 1] are the tokens of code c, in token order; offsets[num_buckets] is the
    number of valid tokens, and the tokens that mask leaves out follow in token order.
    """
    keys = np.asarray(codes).astype(np.int64)
    if mask is not None:
        keys = np.where(np.asarray(mask, bool)[:, None, None, :], keys, num_buckets)
    order = np.argsort(keys, axis=-1, kind="stable").astype(np.int32)
    offsets = np.zeros((*keys.shape[:-1], num_buckets + 1), np.int32)
    for row in np.ndindex(keys.shape[:-1]):
        offsets[row] = np.searchsorted(np.sort(keys[row]), np.arange(num_buckets + 1))
    return order, offsets
