"""Sparse attention and SEA against torch's scaled_dot_product_attention, and what a user would write in torch."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np

import subquad
from bench import cases, machine, report
from bench.report import Bench
from bench.timing import Pair, paired, timed

KEYS, COLUMNS, FEATURES = 64, 64, 33
SHAPE = cases.Shape()


def random_keys(shape: cases.Shape, keys: int, seed: int = 0) -> np.ndarray:
    """`keys` different keys of every query, in any order, [B, H, N, keys]."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, shape.seq, (shape.batch, shape.heads, shape.seq, keys), np.int32)
    return (drawn + np.arange(keys, dtype=np.int32) * (shape.seq // keys)) % shape.seq


def alike_blocks(shape: cases.Shape, columns: int, rows: int = 16, causal: bool = False) -> subquad.BlockPattern:
    """One column of `columns` for every query and head, the same for `rows` queries in a row."""
    chosen = np.random.default_rng(0).integers(0, columns, (shape.batch, shape.heads, -(-shape.seq // rows), 1))
    probs = np.zeros((*chosen.shape[:3], columns), np.float32)
    np.put_along_axis(probs, chosen, 1, 3)
    probs = np.repeat(probs, rows, axis=2)[:, :, : shape.seq]
    return subquad.select_blocks(probs, top_k=shape.seq / columns, group="query", is_causal=causal)


def check(bench: Bench) -> None:
    """Refuses to print speeds of wrong kernels: sparse attention to every key must be SDPA's."""
    shape = cases.Shape(heads=2, seq=300)
    q, k, v = bench.inputs(shape)
    every = bench.torch.arange(300, dtype=bench.torch.int32).expand(1, 1, 300, 300)
    probs = bench.torch.rand(1, 2, 300, 16)
    worst = 0.0
    for causal in (False, True):
        exact = bench.sdpa(q, k, v, is_causal=causal)
        found = subquad.sea_attention(q, k, v, probs, top_k=300, is_causal=causal)
        worst = max(worst, float((found - exact).abs().max()))
    worst = max(worst, float((subquad.sparse_attention(q, k, v, every) - bench.sdpa(q, k, v)).abs().max()))
    if not worst < 1e-5:
        raise SystemExit(f"bench: the kernels are off: {worst}; no speeds")


def entry_rates(bench: Bench, pair: Pair, entries: int, dim: int = 64) -> dict:
    """Time per entry, and the bytes of keys and values that it names as a share of the copy bandwidth."""
    seconds = pair.ours.median
    moved = entries * 2 * dim * 4
    return {
        "ms": seconds * 1e3,
        "iqr_ms": pair.ours.iqr * 1e3,
        "theirs_ms": pair.theirs.median * 1e3,
        "ns_per_entry": seconds * 1e9 / entries,
        "GFLOP/s": entries * 4 * dim / seconds / 1e9,
        "GB/s": moved / seconds / 1e9,
        "of_copy": moved / seconds / machine.copy_bandwidth(bench.threads),
    }


def gathered(torch, q, k, v, indices):
    """What a user writes: keys and values of every query side by side, [B, H, N, S, D] each."""
    batch, heads = (torch.arange(n).view(shape) for n, shape in ((q.shape[0], (-1, 1, 1, 1)), (q.shape[1], (-1, 1, 1))))
    index = indices.long()
    near_k, near_v = k[batch, heads, index], v[batch, heads, index]
    weights = (q.unsqueeze(3) @ near_k.transpose(3, 4) * q.shape[3] ** -0.5).softmax(4)
    return (weights @ near_v).squeeze(3)


def attention(bench: Bench) -> None:
    q, k, v = bench.inputs(SHAPE)
    entries = SHAPE.tokens * KEYS
    indices = bench.torch.from_numpy(random_keys(SHAPE, KEYS))
    ours = lambda: subquad.sparse_attention(q, k, v, indices)  # noqa: E731
    if float((ours() - gathered(bench.torch, q, k, v, indices)).abs().max()) > 1e-5:
        raise SystemExit("bench: sparse_attention is not gather and softmax; no speeds")
    pair = paired(ours, lambda: bench.sdpa(q, k, v), bench.budget)
    bench.report("64 random keys against SDPA", pair.ratio.median, 15.0, **entry_rates(bench, pair, entries))
    pair = paired(ours, lambda: gathered(bench.torch, q, k, v, indices), bench.budget)
    bench.report("64 random keys against gather and softmax", pair.ratio.median, 15.0,
                 **entry_rates(bench, pair, entries))  # fmt: skip
    for name, columns, causal in (
        ("blocks of 64", 64, False),
        ("blocks of 16", 256, False),
        ("causal blocks", 64, True),
    ):
        pattern = _as_torch(bench, alike_blocks(SHAPE, columns, causal=causal))
        count = int(subquad.expand_blocks(pattern).indptr[-1])
        run = lambda p=pattern: subquad.sparse_attention(q, k, v, p)  # noqa: E731
        pair = paired(run, lambda c=causal: bench.sdpa(q, k, v, is_causal=c), bench.budget)
        target = 20.0 if name == "blocks of 64" else None
        bench.report(f"{name}, {count // SHAPE.tokens} keys, against SDPA", pair.ratio.median, target,
                     **entry_rates(bench, pair, count))  # fmt: skip


def _as_torch(bench: Bench, p: subquad.BlockPattern) -> subquad.BlockPattern:
    take = bench.torch.from_numpy
    return subquad.BlockPattern(take(p.bits), p.K, take(p.visible), p.block_cap, None, p.num_keys)


def decode(bench: Bench) -> None:
    """One query over a cache of 131072 tokens, 2048 of them selected per head, others in every call: what was selected
    before is out of the processor's caches."""
    torch, length, keys = bench.torch, 131072, 2048
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, 8, n, 64), generator=random) for n in (1, length, length))
    drawn = [torch.randint(0, length, (1, 8, 1, keys), generator=random, dtype=torch.int32) for _ in range(16)]
    turn = itertools.cycle(drawn)
    pair = paired(lambda: subquad.sparse_attention(q, k, v, next(turn)), lambda: bench.sdpa(q, k, v), bench.budget)
    bench.report("decode, 2048 of 131072 keys, against SDPA", pair.ratio.median, 30.0,
                 **entry_rates(bench, pair, 8 * keys))  # fmt: skip


def training(bench: Bench) -> None:
    from subquad import torch as sqt

    q, k, v = bench.inputs(SHAPE, grad=True)
    indices = bench.torch.from_numpy(random_keys(SHAPE, KEYS))
    blocks = _as_torch(bench, alike_blocks(SHAPE, COLUMNS))
    for name, pattern in (("64 random keys", indices), ("blocks of 64", blocks)):
        pair = paired(
            lambda p=pattern: bench.step(lambda q, k, v: sqt.sparse_attention(q, k, v, p), q, k, v),
            lambda: bench.step(lambda q, k, v: bench.sdpa(q, k, v), q, k, v),
            bench.budget,
        )
        bench.report(f"forward + backward, {name}", pair.ratio.median, None, ms=pair.ours.median * 1e3,
                     sdpa_ms=pair.theirs.median * 1e3)  # fmt: skip


def estimator_weights(heads: int, dim: int, columns: int, positions: int) -> dict[str, np.ndarray]:
    """Causal weights of the published sizes: any values, for they decide what is selected and not how long it takes."""
    random = np.random.default_rng(0)
    width, channels = columns // 4, 2 * heads
    shapes = {
        "projection": (FEATURES, dim), "position": (positions, dim), "encoder_weight": (2 * dim, 3 * dim),
        "encoder_bias": (2 * dim,), "encoder_norm_weight": (2 * dim,), "encoder_norm_bias": (2 * dim,),
        "scaler_weight": (2, 2 * dim), "scaler_bias": (2,), "row_weight": (2 * width, 2 * dim),
        "row_bias": (2 * width,), "row_norm_weight": (width,), "row_norm_bias": (width,),
        "conv1_weight": (channels, channels, 3, 3), "conv1_bias": (channels,),
        "conv2_weight": (channels, channels, 3, 3), "conv2_bias": (channels,),
        "out_weight": (heads, channels), "out_bias": (heads,), "norm_weight": (columns,), "norm_bias": (columns,),
    }  # fmt: skip
    return {
        name: random.standard_normal(shape, np.float32) * np.float32(np.prod(shape[1:]) ** -0.5)
        for name, shape in shapes.items()
    }


def layer(bench: Bench) -> None:
    """What one layer does in inference: the estimate, the selection, the sparse attention and the mix."""
    heads, seconds = 12, {}
    weights = {n: bench.torch.from_numpy(w) for n, w in estimator_weights(heads, 64, COLUMNS, 65536).items()}
    for seq, target in ((2048, 1.2), (8192, 3.0)):
        q, k, v = bench.inputs(cases.Shape(heads=heads, seq=seq))
        pair = paired(lambda: sea(q, k, v, weights), lambda: bench.sdpa(q, k, v, is_causal=True), bench.budget)
        spent = timed(lambda: subquad.sea_estimate(q, k, v, weights, is_causal=True), bench.budget / 2)
        seconds[seq] = pair.ours.median
        bench.report(f"SEA layer, T={seq}, against causal SDPA", pair.ratio.median, target, ms=pair.ours.median * 1e3,
                     sdpa_ms=pair.theirs.median * 1e3, estimate_ms=spent.median * 1e3)  # fmt: skip
    q, k, v = bench.inputs(cases.Shape(heads=heads, seq=65536))
    spent = timed(lambda: sea(q, k, v, weights), bench.budget, at_least=3)
    bench.report("SEA layer, T=65536 / T=8192", spent.median / seconds[8192], 9.0, below=True, ms=spent.median * 1e3)
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    bench.report(
        "SEA layer, T=8192: peak memory", float(found), 768.0, " MiB", below=True, of_matrix=float(found) / 3072
    )


def sea(q, k, v, weights):
    probs, row_scale, mix = subquad.sea_estimate(q, k, v, weights, is_causal=True)
    return subquad.sea_attention(q, k, v, probs, row_scale=row_scale, mix=mix, is_causal=True, top_k=KEYS)


PEAK = """
import numpy as np, subquad
from bench import sparse
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
q, k, v = (np.random.default_rng(i).standard_normal((1, 12, 8192, 64), np.float32) for i in range(3))
weights = sparse.estimator_weights(12, 64, 64, 8192)
before = peak()
sparse.sea(q, k, v, weights)
print(peak() - before)
"""


def selection(bench: Bench) -> None:
    torch = bench.torch
    probs = torch.rand((1, 12, 8192, COLUMNS), generator=torch.Generator().manual_seed(0)).softmax(3)
    flat = probs.transpose(1, 2).reshape(8192, 12 * COLUMNS)
    ours = lambda: subquad.select_blocks(probs, is_causal=True, top_k=KEYS)  # noqa: E731
    pair = paired(ours, lambda: flat.sort(dim=1, descending=True), bench.budget)
    bench.report("selection of 8192 rows against torch.sort", pair.ratio.median, 20.0, ms=pair.ours.median * 1e3,
                 sort_ms=pair.theirs.median * 1e3, ns_per_score=pair.ours.median * 1e9 / flat.numel())  # fmt: skip
    scores = torch.rand((1, 8, 1, 131072), generator=torch.Generator().manual_seed(0))
    pair = paired(lambda: subquad.topk_select(scores, 2048), lambda: scores.topk(2048, dim=3), bench.budget)
    bench.report("2048 of 131072 scores against torch.topk", pair.ratio.median, None, ms=pair.ours.median * 1e3,
                 topk_ms=pair.theirs.median * 1e3)  # fmt: skip


def main(argv: list[str]) -> int:
    parts = {
        "attention": attention,
        "decode": decode,
        "training": training,
        "layer": layer,
        "selection": selection,
    }
    return report.run("sparse", __doc__ or "", argv, parts, check)
