"""Attention by its formula in float64: exact softmax attention, and the expectation of YOSO.

Both go over blocks of queries, so that memory stays linear in the number of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_BLOCK_BYTES = 4 << 20  # weights of one block of queries: a few passes over them stay in the cache


def softmax_attention(q: Array, k: Array, v: Array, rows: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(D)) v for the query rows `rows` (None: all)."""

    def weigh(queries: Array, keys: Array) -> Array:
        weights = (queries * q.shape[-1] ** -0.5) @ keys.T
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        return weights

    return _blocked(q, k, v, rows, weigh, divide=True)


def yoso_expectation(q: Array, k: Array, v: Array, hash_bits: int, rows: Array | None = None) -> Array:
    """sum_m (1 - angle(q_n, k_m) / pi)^hash_bits v_m, rows not normalised; a zero vector is at right angles to all."""

    def weigh(queries: Array, keys: Array) -> Array:
        weights = np.clip(_unit(queries) @ _unit(keys).T, -1, 1)
        np.arccos(weights, out=weights)
        weights /= -np.pi
        weights += 1
        return weights**hash_bits

    return _blocked(q, k, v, rows, weigh, divide=False)


def _unit(x: Array) -> Array:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)


def _blocked(
    q: Array, k: Array, v: Array, rows: Array | None, weigh: Callable[[Array, Array], Array], divide: bool
) -> Array:
    if rows is not None:
        q = q[:, :, rows]
    batch, heads, seq = q.shape[:3]
    group = heads // k.shape[1]
    block = max(1, _BLOCK_BYTES // (k.shape[2] * 8))
    out = np.empty((batch, heads, seq, v.shape[3]))
    for b, h in np.ndindex(batch, heads):
        keys, values = (x[b, h // group].astype(np.float64) for x in (k, v))
        for begin in range(0, seq, block):
            part = slice(begin, begin + block)
            weights = weigh(q[b, h, part].astype(np.float64), keys)
            total = weights.sum(axis=-1, keepdims=True) if divide else 1.0
            np.divide(weights @ values, total, out=out[b, h, part])
    return out
