"""Exact attention, RFA, RA, LARA and EVA against torch's scaled_dot_product_attention: speed, error, growth, memory."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys

import subquad
from bench import cases, report
from bench.report import Bench
from bench.timing import paired

FEATURES, LANDMARKS, WINDOW, CHUNK = 256, 49, 64, 64
SHAPE = cases.Shape()


def check(bench: Bench) -> None:
    """Refuses to print speeds of wrong kernels: exact attention must be SDPA's, estimates must approach it."""
    shape = cases.Shape(heads=2, seq=300)
    q, k, v = (0.3 * x for x in bench.inputs(shape))
    for causal in (False, True):
        exact = bench.sdpa(q, k, v, is_causal=causal)
        worst = float((subquad.softmax_attention(q, k, v, is_causal=causal) - exact).abs().max())
        rfa = subquad.rfa_attention(q, k, v, num_features=4096, is_causal=causal)
        eva = subquad.eva_attention(q, k, v, window=300, chunk_size=300, is_causal=causal)
        found = [worst, float((rfa - exact).norm() / exact.norm()), float((eva - exact).abs().max())]
        if not (found[0] < 1e-5 and found[1] < 0.1 and found[2] < 1e-5):
            raise SystemExit(f"bench: the kernels are off (causal={causal}): {found}; no speeds")


def error_of(bench: Bench, estimate, causal: bool = False) -> float:
    """Relative error against exact attention on the built-in sample of real queries, keys and values."""
    from subquad.data import load_sample

    q, k, v = (bench.torch.from_numpy(x) for x in load_sample()[:3])
    exact = subquad.softmax_attention(q, k, v, is_causal=causal)
    return float((estimate(q, k, v) - exact).norm() / exact.norm())


def compare(
    bench: Bench, name: str, ours, target: float | None, flops: int, exps: int, dtype="float32", **sdpa
) -> None:
    """One forward line: ours against SDPA on the same arrays."""
    q, k, v = bench.inputs(SHAPE, dtype)
    pair = paired(lambda: ours(q, k, v), lambda: bench.sdpa(q, k, v, **sdpa), bench.budget)
    itemsize = 4 if dtype == "float32" else 2
    more = bench.rates(pair, flops, cases.attention_bytes(SHAPE, itemsize), exps)
    if dtype == "float32":
        more["error"] = error_of(bench, ours, bool(sdpa))
    bench.report(name, pair.ratio.median, target, **more)


def rfa(q, k, v, **keywords):
    return subquad.rfa_attention(q, k, v, num_features=FEATURES, **keywords)


def lara(q, k, v, **keywords):
    return subquad.lara_attention(q, k, v, num_landmarks=LANDMARKS, **keywords)


def eva(q, k, v, **keywords):
    return subquad.eva_attention(q, k, v, window=WINDOW, chunk_size=CHUNK, **keywords)


PAIRS = SHAPE.tokens * SHAPE.seq
CHUNKS = SHAPE.seq // CHUNK


def exact(bench: Bench) -> None:
    for dtype in ("float32", "bfloat16"):
        for causal in (False, True):
            share, sdpa = (2, {"is_causal": True}) if causal else (1, {})
            ours = functools.partial(subquad.softmax_attention, is_causal=causal)
            name, flops = f"exact {dtype}{' causal' * causal}", cases.exact_flops(SHAPE) // share
            compare(bench, name, ours, 1.0, flops, PAIRS // share, dtype, **sdpa)


def estimates(bench: Bench) -> None:
    tokens = SHAPE.tokens
    compare(bench, "RFA, 256 features", rfa, 6.0, cases.rfa_flops(SHAPE, FEATURES), 2 * tokens * FEATURES)
    compare(
        bench, "RFA, 256 features, causal", lambda q, k, v: rfa(q, k, v, is_causal=True), 3.0,
        cases.rfa_flops(SHAPE, FEATURES, True), 2 * tokens * FEATURES, is_causal=True,
    )  # fmt: skip
    compare(bench, "LARA, 49 landmarks", lara, 15.0, cases.lara_flops(SHAPE, LANDMARKS), 4 * tokens * LANDMARKS)
    compare(
        bench, "EVA, window 64, chunk 64", eva, 12.0, cases.eva_flops(SHAPE, WINDOW, CHUNK), tokens * (WINDOW + CHUNKS)
    )
    compare(
        bench, "EVA, window 64, chunk 64, causal", lambda q, k, v: eva(q, k, v, is_causal=True), None,
        cases.eva_flops(SHAPE, WINDOW, CHUNK, True), tokens * (WINDOW + CHUNKS) // 2, is_causal=True,
    )  # fmt: skip
    compare(bench, "RA, one sample", subquad.randomized_attention, 0.5, 3 * cases.exact_flops(SHAPE) // 2, 2 * PAIRS)


def dtypes(bench: Bench) -> None:
    """bfloat16 against our own float32; the targets are those of the AMX row."""
    amx = subquad.cpu.isa() == "x86_64_amx"
    wide, narrow = bench.inputs(SHAPE), bench.inputs(SHAPE, "bfloat16")
    for name, method, target in (("RFA", rfa, 2.0), ("LARA", lara, 1.5), ("EVA", eva, None)):
        pair = paired(lambda f=method: f(*narrow), lambda f=method: f(*wide), bench.budget)
        bench.report(f"{name} bfloat16: float32's time / ours", pair.ratio.median, target if amx else None,
                     ms=pair.ours.median * 1e3)  # fmt: skip


def training(bench: Bench) -> None:
    from subquad import torch as sqt

    q, k, v = bench.inputs(SHAPE, grad=True)
    steps = (
        ("exact", sqt.softmax_attention, 0.5, {}),
        ("exact causal", sqt.softmax_attention, 0.5, {"is_causal": True}),
        ("RFA", lambda *x: sqt.rfa_attention(*x, num_features=FEATURES), 3.0, {}),
        ("RFA causal", lambda *x, **c: sqt.rfa_attention(*x, num_features=FEATURES, **c), 1.5, {"is_causal": True}),
        ("LARA", lambda *x: sqt.lara_attention(*x, num_landmarks=LANDMARKS), 7.5, {}),
        ("EVA", lambda *x: sqt.eva_attention(*x, window=WINDOW, chunk_size=CHUNK), 6.0, {}),
        ("EVA causal", lambda *x, **c: sqt.eva_attention(*x, window=WINDOW, chunk_size=CHUNK, **c), None,
         {"is_causal": True}),
        ("RA", sqt.randomized_attention, 0.25, {}),
    )  # fmt: skip
    for name, attention, target, causal in steps:
        pair = paired(
            lambda f=attention, c=causal: bench.step(lambda q, k, v: f(q, k, v, **c), q, k, v),
            lambda c=causal: bench.step(lambda q, k, v: bench.sdpa(q, k, v, **c), q, k, v),
            bench.budget,
        )
        bench.report(f"forward + backward {name}", pair.ratio.median, target, ms=pair.ours.median * 1e3,
                     sdpa_ms=pair.theirs.median * 1e3)  # fmt: skip


PEAK = """
import sys, numpy as np, subquad
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
n = int(sys.argv[2])
q, k, v = (np.random.default_rng(i).standard_normal((1, 1, n, 64), np.float32) for i in range(3))
before = peak()
{call}
print(peak() - before)
"""
GROWING = {
    "RFA": "subquad.rfa_attention_bwd(v, q, k, v)",
    "RFA causal": "subquad.rfa_attention_bwd(v, q, k, v, is_causal=True)",
    "LARA": "subquad.lara_attention_bwd(v, q, k, v)",
    "EVA, 64 chunks": "subquad.eva_attention_bwd(v, q, k, v, chunk_size=n // 64, window=256)",
}


def growth(bench: Bench) -> None:
    """Time and peak memory (inputs apart) from N = 16384 to 65536, one head: linear means 4."""
    for name, call in GROWING.items():
        small, large = (bench.inputs(cases.Shape(heads=1, seq=n)) for n in (16384, 65536))
        code = compile(call, name, "eval")
        pair = paired(
            lambda c=code, x=small: eval(c, {"subquad": subquad, "n": 16384, "q": x[0], "k": x[1], "v": x[2]}),
            lambda c=code, x=large: eval(c, {"subquad": subquad, "n": 65536, "q": x[0], "k": x[1], "v": x[2]}),
            bench.budget,
        )
        peak = {}
        for seq in (16384, 65536):
            script = [sys.executable, "-c", PEAK.format(call=call), name, str(seq)]
            peak[f"MiB_{seq}"] = float(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
        bench.report(f"{name} backward, N=65536 / N=16384", pair.ratio.median, 5.0,
                     below=True, ms=pair.theirs.median * 1e3, **peak)  # fmt: skip


def performer(bench: Bench) -> None:
    """The causal path that people use for Performers, where performer-pytorch is installed."""
    if importlib.util.find_spec("performer_pytorch") is None:
        print("performer-pytorch is not installed: pip install performer-pytorch for its line")
        return
    from performer_pytorch import FastAttention

    attention = FastAttention(dim_heads=SHAPE.dim, nb_features=FEATURES, causal=True)
    q, k, v = bench.inputs(SHAPE)
    with bench.torch.no_grad():
        pair = paired(lambda: rfa(q, k, v, is_causal=True), lambda: attention(q, k, v), bench.budget)
    bench.report("causal RFA against performer-pytorch", pair.ratio.median, 45.0, ms=pair.ours.median * 1e3,
                 theirs_ms=pair.theirs.median * 1e3)  # fmt: skip


def main(argv: list[str]) -> int:
    parts = {
        "exact": exact,
        "estimates": estimates,
        "dtypes": dtypes,
        "training": training,
        "growth": growth,
        "performer": performer,
    }
    return report.run("softmax", __doc__ or "", argv, parts, check)
