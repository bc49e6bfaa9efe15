"""Reproducible random arrays from a counter: the same bits on every backend, thread count and tiling.

An array of shape [..., H, N, D] takes, for element (l, n, d) with l the flat index over all axes before the last two
(missing axes count as 1), word d % 4 of Philox4x32-10(counter = (n, d // 4, l, stream), key = seed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _ext
from ._arrays import Array, Jax, framework_of

__all__ = ["random_normal", "random_signs", "random_uniform"]


def _draw(op: str, shape: int | Sequence[int], seed: Any, stream: int, out: Array) -> Array:
    try:
        extents = tuple(int(n) for n in (shape if isinstance(shape, Sequence) else [shape]))
    except (TypeError, ValueError):
        raise TypeError(f"[{op}] shape: expected a sequence of integers, got {shape!r}") from None
    if any(n < 0 for n in extents):
        raise ValueError(f"[{op}] shape: expected extents of at least 0, got {list(extents)}")
    if out is None:
        out = np.empty(extents, np.float32)
    elif framework_of(op, "out", out) is Jax:
        raise TypeError(f"[{op}] out: expected a writable array, got a jax array, which is immutable")
    elif tuple(out.shape) != extents:
        raise ValueError(f"[{op}] out: expected shape {list(extents)}, got {list(out.shape)}")
    getattr(_ext, op)(seed, stream, out)
    return out


def random_uniform(shape: int | Sequence[int], *, seed: Any, stream: int = 0, out: Array = None) -> Array:
    """Uniform numbers in [0, 1): float32 multiples of 2^-24, bit-equal on every backend.

    seed: an int (taken mod 2^64) or a 0-d int64 array. stream: an independent sequence per number in [0, 2^32); 1 to 15
    are the library's own draws. out: a float32 array to fill, which also decides framework and device; default numpy.
    """
    return _draw("random_uniform", shape, seed, stream, out)


def random_normal(shape: int | Sequence[int], *, seed: Any, stream: int = 0, out: Array = None) -> Array:
    """Standard normal numbers by Box-Muller, float32: bit-equal on all CPU rows, within 2 ulp on CUDA.

    Arguments as for random_uniform. Magnitudes end at 6.7 (probability 2e-11 beyond).
    """
    return _draw("random_normal", shape, seed, stream, out)


def random_signs(shape: int | Sequence[int], *, seed: Any, stream: int = 0, out: Array = None) -> Array:
    """Independent signs, float32 +1 or -1: -1 where the top bit of the word is set.

    Arguments as for random_uniform.
    """
    return _draw("random_signs", shape, seed, stream, out)
