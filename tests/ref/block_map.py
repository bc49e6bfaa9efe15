"""Columns and blocks: K columns stand for the n keys that a row sees, in exact integers.

    col(r, n) = floor(((2 r + 1) K - 1) / (2 n)),   start(c, n) = floor((2 c n + K) / (2 K))

r is the rank of a key among those the row sees; it belongs to column c exactly if start(c) <= r < start(c + 1).
Source: nearest interpolation between K columns and n tokens, Lee et al., ICLR 2024.
"""

import numpy as np

from .pairs import visible_pairs


def column(rank, count, num_columns):
    return ((2 * rank + 1) * num_columns - 1) // (2 * count)


def start(c, count, num_columns):
    return (2 * c * count + num_columns) // (2 * num_columns)


def key_columns(batch, seq_q, seq_k, num_columns, key_mask=None, query_mask=None, is_causal=False):
    """[B, N, M]: the column of key m in row n, -1 where the row does not see it."""
    seen = visible_pairs(batch, seq_q, seq_k, key_mask, query_mask, is_causal)[:, 0]
    rank, count = np.cumsum(seen, axis=-1) - 1, seen.sum(axis=-1, keepdims=True)
    return np.where(seen, column(rank, np.maximum(count, 1), num_columns), -1)


def block_membership(batch, seq_q, seq_k, num_columns, key_mask=None, query_mask=None, is_causal=False):
    """[B, 1, N, K, M] bool: row n sees key m and m is in block c."""
    columns = key_columns(batch, seq_q, seq_k, num_columns, key_mask, query_mask, is_causal)
    return columns[:, None, :, None, :] == np.arange(num_columns)[:, None]
