"""Paired timing: two things are timed in turn, and their ratio is taken pair by pair, so that drift hits both."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


class Loaded(RuntimeError):
    """Other processes use the machine, so no figure would mean anything."""


def _busy_jiffies() -> tuple[int, int]:
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def refuse_if_loaded(limit: float = 0.15) -> None:
    """Raises Loaded if others used more than `limit` of all cores during half a second in which we slept."""
    if not os.path.exists("/proc/stat"):
        return
    busy, total = _busy_jiffies()
    time.sleep(0.5)
    busy_after, total_after = _busy_jiffies()
    share = (busy_after - busy) / max(1, total_after - total)
    if share > limit:
        raise Loaded(
            f"the machine is loaded: {share:.0%} of its cores are busy before the measurement (limit {limit:.0%})"
        )


@dataclass
class Spread:
    """Seconds of repeated runs."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: list[float]) -> Spread:
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0])
        quarters = statistics.quantiles(samples, n=4)
        return Spread(statistics.median(samples), quarters[0], quarters[2])

    @property
    def iqr(self) -> float:
        return self.high - self.low


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(run: Callable[[], object], budget: float = 1.0, at_least: int = 5) -> Spread:
    """Repeats `run` for about `budget` seconds after one warm-up run."""
    run()
    samples: list[float] = []
    while len(samples) < at_least or sum(samples) < budget:
        samples.append(seconds(run))
    return Spread.of(samples)


@dataclass
class Pair:
    """`ours` and `theirs` timed in turn; `ratio` is theirs / ours, so above 1 is a speed-up."""

    ours: Spread
    theirs: Spread
    ratio: Spread


def paired(ours: Callable[[], object], theirs: Callable[[], object], budget: float = 2.0, at_least: int = 5) -> Pair:
    """Times the two in turn for about `budget` seconds. A fast one runs several times in a row."""
    ours(), theirs()
    repeat = max(1, min(50, round(seconds(theirs) / max(seconds(ours), 1e-7))))
    a: list[float] = []
    b: list[float] = []
    while len(a) < at_least or sum(a) * repeat + sum(b) < budget:
        a.append(seconds(lambda: [ours() for _ in range(repeat)]) / repeat)
        b.append(seconds(theirs))
    return Pair(Spread.of(a), Spread.of(b), Spread.of([y / x for x, y in zip(a, b, strict=True)]))
