"""Sparsity patterns of any kind as one matrix: ln of the sum of the weights of the entries (n, m), -inf without one.

A pattern is an object with the fields of a block pattern (bits, K, visible, block_cap, positions, num_keys) or of a CSR
matrix (indptr, indices, shape, log_weights), an array of indices [B, 1 | Hkv | H, N, S] (-1 = none), or such an array
and log-weights.
"""

from dataclasses import dataclass

import numpy as np

from .block_map import column, start
from .pairs import repeat_heads


@dataclass(frozen=True, eq=False)
class Blocks:
    """Bit c % 8 of byte c // 8 of a row: the row takes column c."""

    bits: np.ndarray
    K: int
    visible: np.ndarray
    block_cap: int
    positions: np.ndarray | None = None
    num_keys: int | None = None


@dataclass(frozen=True, eq=False)
class Csr:
    indptr: np.ndarray
    indices: np.ndarray
    shape: tuple
    log_weights: np.ndarray | None = None


def pack(selected):
    """[B, H, N, K] bool -> bytes of bits, the lowest column in the lowest bit."""
    return np.packbits(selected, axis=-1, bitorder="little")


def unpack(bits, num_columns):
    return np.unpackbits(np.asarray(bits), axis=-1, count=num_columns, bitorder="little").astype(bool)


def block_entries(blocks):
    """b, h, n, m of the entries of a block pattern, row by row with ascending keys: of each selected column c the
    newest block_cap ranks of [start(c), start(c + 1)) of the keys that the row sees."""
    visible = np.asarray(blocks.visible).astype(np.int64)[..., None]
    rank = np.arange(visible.max(initial=0))
    columns = np.where(rank < visible, column(rank, np.maximum(visible, 1), blocks.K), 0)
    kept = (rank < visible) & (rank >= start(columns + 1, visible, blocks.K) - blocks.block_cap)
    selected = unpack(blocks.bits, blocks.K)
    columns = np.broadcast_to(columns[:, None], (*selected.shape[:3], len(rank)))
    b, h, n, r = np.nonzero(np.take_along_axis(selected, columns, axis=-1) & kept[:, None])
    return b, h, n, r if blocks.positions is None else np.asarray(blocks.positions)[b, r]


def entries(pattern, heads):
    """b, h, n, m and log_weight of every entry; heads: those of the queries."""
    if hasattr(pattern, "bits"):
        places, log_weights = block_entries(pattern), 0.0
    elif hasattr(pattern, "indptr"):
        owner = np.repeat(np.arange(np.prod(pattern.shape[:3])), np.diff(pattern.indptr))
        places = *np.unravel_index(owner, pattern.shape[:3]), np.asarray(pattern.indices)
        log_weights = 0.0 if pattern.log_weights is None else np.asarray(pattern.log_weights)
    else:
        indices, log_weights = pattern if isinstance(pattern, tuple) else (pattern, None)
        indices = repeat_heads(np.asarray(indices), heads)
        places = *np.nonzero(indices >= 0)[:3], indices[indices >= 0]
        log_weights = 0.0 if log_weights is None else repeat_heads(np.asarray(log_weights), heads)[indices >= 0]
    return *places, np.broadcast_to(log_weights, places[3].shape)


def pattern_matrix(pattern, batch, heads, seq_q, seq_k, dtype=np.float64):
    """[B, H, N, M]: ln sum over the entries (n, m) of e^log_weight."""
    matrix = np.full((batch, heads, seq_q, seq_k), -np.inf, dtype)
    *places, log_weights = entries(pattern, heads)
    np.logaddexp.at(matrix, tuple(places), log_weights.astype(dtype))
    return matrix
