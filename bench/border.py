"""What it costs to convert the arrays of a call: nanoseconds for none, one and three arrays of each framework."""

from __future__ import annotations

import argparse
import importlib
import json
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import machine
from bench.timing import Spread, refuse_if_loaded
from subquad import _ext

SHAPE = (2, 8, 16, 64)
TARGETS_NS = {"numpy": 500, "numpy bfloat16": 500, "torch": 800, "torch Parameter": 800}  # of three arrays


def makers() -> dict[str, Callable[[], Any]]:
    """How to make an array of each framework that is installed."""
    found: dict[str, Callable[[], Any]] = {"numpy": lambda: np.ones(SHAPE, np.float32)}
    for name in ("ml_dtypes", "torch", "jax"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if name == "ml_dtypes":
            found["numpy bfloat16"] = lambda dtype=module.bfloat16: np.ones(SHAPE, dtype)
        elif name == "torch":
            found["torch"] = lambda torch=module: torch.ones(SHAPE)
            found["torch Parameter"] = lambda torch=module: torch.nn.Parameter(torch.ones(SHAPE), requires_grad=False)
        else:
            found["jax"] = lambda jax=module: jax.numpy.ones(SHAPE)
    return found


def nanoseconds(arguments: tuple[Any, ...], budget: float) -> Spread:
    """One call of `_ext._convert`, the time of the call itself included."""
    timer = timeit.Timer("f(a, b, c)", globals=dict(zip("fabc", (_ext._convert, *arguments), strict=True)))
    calls, seconds = timer.autorange()
    calls = max(1, int(calls * 0.02 / seconds))
    return Spread.of([1e9 * t / calls for t in timer.repeat(max(5, int(budget / 0.02)), calls)])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench border", description=__doc__)
    parser.add_argument("--budget", type=float, default=0.4, help="seconds per figure")
    args = parser.parse_args(argv)
    refuse_if_loaded()
    print(f"{machine.name()}, commit {machine.commit()}; medians in ns, (iqr)")
    print(f"{'framework':18} {'no array':>14} {'one':>14} {'three':>14}   target of three")
    lines = []
    for name, make in makers().items():
        a, b, c = make(), make(), make()
        shape = _ext._describe(a)[1]
        if shape != SHAPE:
            raise SystemExit(f"bench: {name} is seen as {shape}, not {SHAPE}; no figures")
        spreads = [nanoseconds(x, args.budget) for x in ((None, None, None), (a, None, None), (a, b, c))]
        none, one, three = (s.median for s in spreads)
        target = TARGETS_NS.get(name)
        goal = "" if target is None else f"{target} {'met' if three <= target else 'MISSED'}"
        print(f"{name:18} " + " ".join(f"{s.median:7.0f} ({s.iqr:4.0f})" for s in spreads) + f"   {goal}", flush=True)
        lines.append({"framework": name, "none_ns": none, "one_ns": one, "three_ns": three, "target_ns": target})
    for line in lines:
        print(json.dumps(line | {"machine": machine.name()}))
    return 0
