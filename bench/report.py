"""What the measurements against exact attention share: inputs, lines with their targets, the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import subquad
from bench import cases, machine
from bench.timing import Pair, refuse_if_loaded


class Bench:
    """The lines of one run: printed as a table row each, collected for --json, compared with their targets."""

    def __init__(self, budget: float, threads: int):
        import torch

        self.torch = torch
        self.budget, self.threads = budget, threads
        self.lines: list[dict] = []

    def inputs(self, shape: cases.Shape, dtype: str = "float32", grad: bool = False):
        generator = self.torch.Generator().manual_seed(0)
        size = (shape.batch, shape.heads, shape.seq, shape.dim)
        make = lambda: self.torch.randn(size, generator=generator).to(getattr(self.torch, dtype))  # noqa: E731
        return [make().requires_grad_(grad) for _ in range(3)]

    def sdpa(self, q, k, v, **keywords):
        return self.torch.nn.functional.scaled_dot_product_attention(q, k, v, **keywords)

    def step(self, attention: Callable, q, k, v) -> None:
        """Forward and backward."""
        q.grad = k.grad = v.grad = None
        attention(q, k, v).backward(v.detach())

    def report(
        self, name: str, value: float, target: float | None, unit: str = "x", below: bool = False, **more
    ) -> None:
        met = None if target is None else bool(value <= target if below else value >= target)
        self.lines.append({"name": name, "value": value, "unit": unit, "target": target, "met": met} | more)
        goal = "" if target is None else f"{'<=' if below else '>='} {target:g} {'met' if met else 'MISSED'}"
        detail = "  ".join(
            f"{key} {number:.3g}" if isinstance(number, float) else f"{key} {number}" for key, number in more.items()
        )
        print(f"{name:44} {value:8.2f}{unit:2} {goal:16} {detail}", flush=True)

    def rates(self, pair: Pair, flops: int, moved: int, exps: int = 0) -> dict:
        """Time, and how far it is from the peaks of the machine: multiply-adds, copies, exponentials."""
        seconds = pair.ours.median
        peak, copy = machine.fma_peak(self.threads), machine.copy_bandwidth(self.threads)
        found = {
            "ms": seconds * 1e3,
            "iqr_ms": pair.ours.iqr * 1e3,
            "sdpa_ms": pair.theirs.median * 1e3,
            "GFLOP/s": flops / seconds / 1e9,
            "of_peak": flops / seconds / peak if peak else float("nan"),
            "GB/s": moved / seconds / 1e9,
            "of_copy": moved / seconds / copy,
        }
        if exps:
            limit = machine.exp_peak(self.threads)
            found["of_exp_limit"] = exps / seconds / limit if limit else float("nan")
        return found


def write_json(path: str, lines: list[dict], more: dict) -> None:
    """The lines with what they have in common, one object a line."""
    with open(path, "w") as file:
        for line in lines:
            file.write(json.dumps(line | more, default=float) + "\n")


def summary(lines: list[dict]) -> str:
    missed = [line["name"] for line in lines if line["met"] is False]
    met = sum(line["met"] is True for line in lines)
    return f"{met} targets met, {len(missed)} missed" + "".join(f"\n  {name}" for name in missed)


def run(name: str, doc: str, argv: list[str], parts: dict[str, Callable[[Bench], None]], check: Callable) -> int:
    """The command line of one measurement: runs `check`, then its parts, and counts the targets."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=doc)
    parser.add_argument("--json", metavar="FILE", help="also write the lines as JSON, one object a line")
    parser.add_argument("--threads", type=int, default=2, help="threads for both sides (2)")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per comparison (2)")
    parser.add_argument("--only", choices=list(parts))
    parser.add_argument("--force", action="store_true", help="measure even if the machine is busy")
    args = parser.parse_args(argv)
    if not args.force:
        refuse_if_loaded()
    bench = Bench(args.budget, args.threads)
    bench.torch.set_num_threads(args.threads)
    bench.torch.manual_seed(0)
    print(
        f"{machine.name()}, {subquad.cpu.isa()}, {subquad.cpu.num_threads()} threads, torch {bench.torch.__version__}, "
        f"commit {machine.commit()}"
    )
    print(
        f"copy {machine.copy_bandwidth(args.threads) / 1e9:.1f} GB/s, "
        f"FMA {machine.fma_peak(args.threads) / 1e9:.0f} GFLOP/s, "
        f"exp {machine.exp_peak(args.threads) / 1e9:.1f} G/s; float32, B=1, H=8, D=64, pairs with SDPA, medians"
    )
    check(bench)
    for part, body in parts.items():
        if args.only in (None, part):
            body(bench)
    if args.json:
        write_json(args.json, bench.lines, {"machine": machine.name(), "isa": subquad.cpu.isa()})
    print(summary(bench.lines))
    return 0
