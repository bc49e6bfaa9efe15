"""YOSO against torch's scaled_dot_product_attention in one run: speed, error, growth, break-even."""

from __future__ import annotations

import argparse
import json

import subquad
from bench import cases, machine
from bench.timing import Pair, paired, refuse_if_loaded


class Bench:
    """The lines of one run: printed as a table row each, collected for --json, compared with their targets."""

    def __init__(self, budget: float):
        import torch

        self.torch = torch
        self.budget = budget
        self.lines: list[dict] = []

    def inputs(self, shape: cases.Shape, dtype: str = "float32", grad: bool = False):
        generator = self.torch.Generator().manual_seed(0)
        size = (shape.batch, shape.heads, shape.seq, shape.dim)
        make = lambda: self.torch.randn(size, generator=generator).to(getattr(self.torch, dtype))  # noqa: E731
        return [make().requires_grad_(grad) for _ in range(3)]

    def sdpa(self, q, k, v):
        return self.torch.nn.functional.scaled_dot_product_attention(q, k, v)

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


def error_of(bench: Bench, shape: cases.Shape, hashes: int, bits: int) -> float:
    """Relative error of the un-normalised sampled sum against the expectation it estimates."""
    q, k, v = bench.inputs(shape)
    sampled = subquad.yoso_attention(q, k, v, num_hashes=hashes, hash_bits=bits, normalize=False)
    exact = subquad.yoso_attention(q, k, v, expectation=True, hash_bits=bits, normalize=False)
    return float((sampled - exact).norm() / exact.norm())


def check_unbiased(bench: Bench) -> None:
    """Refuses to print speeds of a wrong kernel: the mean over seeds must approach the expectation."""
    shape = cases.Shape(heads=2, seq=256)
    q, k, v = bench.inputs(shape)
    exact = subquad.yoso_attention(q, k, v, expectation=True, hash_bits=6, normalize=False)
    draws = [
        subquad.yoso_attention(q, k, v, num_hashes=64, hash_bits=6, seed=s, normalize=False, hashing="gaussian")
        for s in range(32)
    ]
    one = float((draws[0] - exact).norm() / exact.norm())
    mean = float((sum(draws) / len(draws) - exact).norm() / exact.norm())
    if not mean < 0.25 * one:
        raise SystemExit(
            f"bench: the sampled sum does not approach its expectation ({one:.3f} -> {mean:.3f}); no speeds"
        )


def rates(pair: Pair, flops: int, moved: int, threads: int) -> dict:
    seconds = pair.ours.median
    peak, copy = machine.fma_peak(threads), machine.copy_bandwidth(threads)
    return {
        "ms": seconds * 1e3,
        "iqr_ms": pair.ours.iqr * 1e3,
        "sdpa_ms": pair.theirs.median * 1e3,
        "GFLOP/s": flops / seconds / 1e9,
        "of_peak": flops / seconds / peak if peak else float("nan"),
        "GB/s": moved / seconds / 1e9,
        "of_copy": moved / seconds / copy,
    }


def forward(bench: Bench, threads: int) -> None:
    targets = {(16, 8): {256: 1.0, 512: 4.0, 4096: 25.0}, (32, 9): {4096: 12.0}}
    for (hashes, bits), wanted in targets.items():
        for seq in (128, 256, 512, 1024, 2048, 4096):
            shape = cases.Shape(seq=seq)
            q, k, v = bench.inputs(shape)
            pair = paired(
                lambda: subquad.yoso_attention(q, k, v, num_hashes=hashes, hash_bits=bits),
                lambda: bench.sdpa(q, k, v),
                bench.budget,
            )
            more = rates(pair, cases.yoso_flops(shape, hashes, bits), cases.attention_bytes(shape), threads)
            if seq <= 4096:
                more["error"] = error_of(bench, shape, hashes, bits)
            bench.report(f"forward ({hashes}, {bits}) N={seq}", pair.ratio.median, wanted.get(seq), **more)


def growth(bench: Bench, backward: bool) -> None:
    """How time grows with N. The forward pass writes into one output: fresh pages cost what the system asks."""

    def run_at(seq):
        q, k, v = bench.inputs(cases.Shape(seq=seq))
        out = bench.torch.zeros_like(q)
        if backward:
            return lambda: subquad.yoso_attention_bwd(v, q, k, v, num_hashes=16, hash_bits=8)
        return lambda: subquad.yoso_attention(q, k, v, num_hashes=16, hash_bits=8, out=out)

    pair = paired(run_at(8192), run_at(32768), bench.budget)
    name = "backward" if backward else "forward"
    bench.report(
        f"{name} (16, 8) time N=32768 / N=8192",
        pair.ratio.median,
        4.4 if not backward else None,
        below=True,
        ms=pair.theirs.median * 1e3,
    )


def expectation(bench: Bench, threads: int) -> None:
    for seq in (512, 4096):
        shape = cases.Shape(seq=seq)
        q, k, v = bench.inputs(shape)
        pair = paired(
            lambda: subquad.yoso_attention(q, k, v, expectation=True), lambda: bench.sdpa(q, k, v), bench.budget
        )
        more = rates(pair, cases.exact_flops(shape), cases.attention_bytes(shape), threads)
        bench.report(
            f"expectation (8) N={seq}: time / SDPA's",
            1 / pair.ratio.median,
            1.1 if seq == 4096 else None,
            below=True,
            **more,
        )


def training(bench: Bench, threads: int) -> None:
    from subquad import torch as sqt

    for seq in (512, 4096):
        shape = cases.Shape(seq=seq)
        q, k, v = bench.inputs(shape, grad=True)

        def step(attention, q=q, k=k, v=v):
            q.grad = k.grad = v.grad = None
            attention(q, k, v).backward(v.detach())

        for name, keywords, target in (
            ("sampled", dict(num_hashes=16, hash_bits=8), 8.0),
            ("sampled_exact", dict(num_hashes=16, hash_bits=8, grad="sampled_exact"), None),
            ("expectation", dict(expectation=True), None),
        ):
            pair = paired(
                lambda k_=keywords: step(lambda q, k, v: sqt.yoso_attention(q, k, v, **k_)),
                lambda: step(bench.sdpa),
                bench.budget,
            )
            flops = cases.exact_flops(shape, True) if name == "expectation" else cases.yoso_flops(shape, 16, 8, True)
            more = rates(pair, flops, 2 * cases.attention_bytes(shape), threads)
            bench.report(
                f"forward + backward {name} N={seq}", pair.ratio.median, target if seq == 4096 else None, **more
            )


def dtypes(bench: Bench) -> None:
    shape = cases.Shape()
    wide = bench.inputs(shape)
    for dtype in ("float16", "bfloat16"):
        narrow = bench.inputs(shape, dtype)
        for name, keywords in (("(16, 8)", dict(num_hashes=16, hash_bits=8)), ("expectation", dict(expectation=True))):
            pair = paired(
                lambda: subquad.yoso_attention(*narrow, **keywords),
                lambda: subquad.yoso_attention(*wide, **keywords),
                2 * bench.budget,
            )
            bench.report(
                f"forward {name} {dtype}: time / float32's",
                1 / pair.ratio.median,
                1.0,
                below=True,
                ms=pair.ours.median * 1e3,
            )


def break_even(bench: Bench) -> None:
    """The smallest N from which (16, 8) stays ahead, on a grid of steps of 32."""
    last_behind = 0
    for seq in range(64, 545, 32):
        q, k, v = bench.inputs(cases.Shape(seq=seq))
        pair = paired(
            lambda: subquad.yoso_attention(q, k, v, num_hashes=16, hash_bits=8),
            lambda: bench.sdpa(q, k, v),
            bench.budget / 4,
            15,
        )
        if pair.ratio.median < 1:
            last_behind = seq
    bench.report("break-even N of forward (16, 8)", last_behind + 32, 256, unit="", below=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench yoso", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the lines as JSON, one object a line")
    parser.add_argument("--threads", type=int, default=2, help="threads for both sides (2)")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per comparison (2)")
    parser.add_argument("--only", choices=["forward", "growth", "expectation", "training", "dtypes", "break_even"])
    parser.add_argument("--force", action="store_true", help="measure even if the machine is busy")
    args = parser.parse_args(argv)
    if not args.force:
        refuse_if_loaded()
    bench = Bench(args.budget)
    bench.torch.set_num_threads(args.threads)
    bench.torch.manual_seed(0)
    print(
        f"{machine.name()}, {subquad.cpu.isa()}, {subquad.cpu.num_threads()} threads, torch {bench.torch.__version__}, "
        f"commit {machine.commit()}"
    )
    print(
        f"copy {machine.copy_bandwidth(args.threads) / 1e9:.1f} GB/s, "
        f"FMA {machine.fma_peak(args.threads) / 1e9:.0f} GFLOP/s; "
        "float32, B=1, H=8, D=64, pairs with SDPA, medians"
    )
    check_unbiased(bench)
    parts = {
        "forward": lambda: forward(bench, args.threads),
        "growth": lambda: (growth(bench, False), growth(bench, True)),
        "expectation": lambda: expectation(bench, args.threads),
        "training": lambda: training(bench, args.threads),
        "dtypes": lambda: dtypes(bench),
        "break_even": lambda: break_even(bench),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            part()
    if args.json:
        with open(args.json, "w") as file:
            for line in bench.lines:
                file.write(
                    json.dumps(line | {"machine": machine.name(), "isa": subquad.cpu.isa()}, default=float) + "\n"
                )
    missed = [line["name"] for line in bench.lines if line["met"] is False]
    print(
        f"{sum(line['met'] is True for line in bench.lines)} targets met, {len(missed)} missed"
        + "".join(f"\n  {m}" for m in missed)
    )
    return 0
