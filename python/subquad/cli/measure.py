"""Times, peak memory and errors of calls in this process."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[], object]


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(calls: Sequence[Call], repeats: int, say: Callable[[int], None]) -> list[list[float]]:
    """Seconds of `repeats` calls of each, after one warm-up each. The calls take turns, so that a machine that slows
    down for a while slows all of them; say(round) is told the round that begins."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        say(turn)
        for call, found in zip(calls, times, strict=True):
            spent = seconds(call)
            if turn > 0:
                found.append(spent)
    return times


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def peak_bytes(call: Call) -> int | None:
    """By how much the peak resident memory of this process exceeds its memory before the call: everything counts,
    whoever allocates it, the result included. None where the system does not tell. Earlier garbage that the allocator
    has kept would hide a part, so call it early, in a fresh process."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
        trim(0)
    except (OSError, AttributeError):  # no glibc
        pass
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak so far is forgotten
        before = _status_bytes("VmRSS")
        result = call()
        peak = _status_bytes("VmHWM")
    except (OSError, KeyError):
        return None
    del result
    return max(0, peak - before)


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[name].split()[0]) << 10


def some_rows(seq: int, limit: int) -> Array:
    """All of 0..seq-1, or `limit` of them evenly spaced."""
    return np.arange(seq) if seq <= limit else np.linspace(0, seq - 1, limit).round().astype(np.int64)


def relative_error(found: Array, expected: Array) -> float:
    """|found - expected| / |expected| over all elements, in float64."""
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(np.subtract(found, expected, dtype=np.float64)) / np.linalg.norm(expected))


def mean_cosine(found: Array, expected: Array) -> float:
    """Mean cosine of the rows of two arrays; a zero row counts as 0."""
    found = found.astype(np.float64)
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        products = (found * expected).sum(axis=-1)
        return float(np.mean(np.divide(products, lengths, out=np.zeros_like(products), where=lengths != 0)))
