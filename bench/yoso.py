"""YOSO against torch's scaled_dot_product_attention in one run: speed, error, growth, break-even."""

from __future__ import annotations

import subquad
from bench import cases, report
from bench.report import Bench
from bench.timing import paired


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


def forward(bench: Bench) -> None:
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
            more = bench.rates(pair, cases.yoso_flops(shape, hashes, bits), cases.attention_bytes(shape))
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


def expectation(bench: Bench) -> None:
    for seq in (512, 4096):
        shape = cases.Shape(seq=seq)
        q, k, v = bench.inputs(shape)
        pair = paired(
            lambda: subquad.yoso_attention(q, k, v, expectation=True), lambda: bench.sdpa(q, k, v), bench.budget
        )
        more = bench.rates(pair, cases.exact_flops(shape), cases.attention_bytes(shape))
        bench.report(
            f"expectation (8) N={seq}: time / SDPA's",
            1 / pair.ratio.median,
            1.1 if seq == 4096 else None,
            below=True,
            **more,
        )


def training(bench: Bench) -> None:
    from subquad import torch as sqt

    for seq in (512, 4096):
        shape = cases.Shape(seq=seq)
        q, k, v = bench.inputs(shape, grad=True)

        for name, keywords, target in (
            ("sampled", dict(num_hashes=16, hash_bits=8), 8.0),
            ("sampled_exact", dict(num_hashes=16, hash_bits=8, grad="sampled_exact"), None),
            ("expectation", dict(expectation=True), None),
        ):
            pair = paired(
                lambda k_=keywords: bench.step(lambda q, k, v: sqt.yoso_attention(q, k, v, **k_), q, k, v),
                lambda: bench.step(bench.sdpa, q, k, v),
                bench.budget,
            )
            flops = cases.exact_flops(shape, True) if name == "expectation" else cases.yoso_flops(shape, 16, 8, True)
            more = bench.rates(pair, flops, 2 * cases.attention_bytes(shape))
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


def both_growths(bench: Bench) -> None:
    growth(bench, False)
    growth(bench, True)


def main(argv: list[str]) -> int:
    parts = {
        "forward": forward,
        "growth": both_growths,
        "expectation": expectation,
        "training": training,
        "dtypes": dtypes,
        "break_even": break_even,
    }
    return report.run("yoso", __doc__ or "", argv, parts, check_unbiased)
