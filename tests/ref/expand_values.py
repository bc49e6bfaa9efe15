"""Columns to keys: out_nm = x_{n, col(rank of m, n)} for the keys that row n sees, 0 elsewhere."""

import numpy as np

from .block_map import key_columns


def expand_values(x, num_keys, *, key_mask=None, query_mask=None, is_causal=False, dtype=np.float64):
    """x [B, H, N, K] -> [B, H, N, num_keys]."""
    batch, _, seq_q, num_columns = x.shape
    columns = key_columns(batch, seq_q, num_keys, num_columns, key_mask, query_mask, is_causal)[:, None]
    index = np.broadcast_to(np.maximum(columns, 0), (*x.shape[:3], num_keys))
    return np.where(columns >= 0, np.take_along_axis(np.asarray(x).astype(dtype), index, axis=-1), dtype(0))
