"""The operators that are measured by themselves on a CUDA device: their inputs and calls, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import subquad
from bench import cuda_checks as checks
from bench.cuda_model import Case

HASHES, BITS, BUCKETS = Case.hashes, Case.bits, 1 << Case.bits


@dataclass
class Operator:
    """By the name that cuda_model.OPERATORS has for it. `make` gives the rotating sets of arrays [B, H, ...], `call`
    takes one, also its first head on the CPU."""

    name: str
    seq: int
    make: Callable[[], list[list]]
    call: Callable
    limit: float = checks.LIMIT


def attend(v, codes_q, codes_k, **keywords):
    return subquad.bucket_attention(codes_q, codes_k, v, BUCKETS, **keywords)


def operators(bench) -> Iterator[Operator]:
    torch, seq, short = bench.torch, bench.seq(16384), bench.seq(4096)
    drawn = {"signs": torch.empty(3, 2, 64), "planes": torch.empty(HASHES, BITS, 64)}
    subquad.random_signs(drawn["signs"].shape, seed=1, out=drawn["signs"])
    subquad.random_normal(drawn["planes"].shape, seed=1, out=drawn["planes"])
    on = {kind: {name: x.to(kind) for name, x in drawn.items()} for kind in {"cpu", bench.device.kind}}

    def hadamard(x):
        return subquad.lsh_hash(x, signs=on[x.device.type]["signs"], num_hashes=HASHES, hash_bits=BITS)

    def gaussian(x):
        return subquad.lsh_hash(x, planes=on[x.device.type]["planes"])

    def rows():
        return bench.sets(seq, 1)

    def codes():
        return [[hadamard(x)] for (x,) in rows()]

    def rows_and_codes():
        return [[v, hadamard(q), hadamard(k)] for q, k, v in bench.sets(seq)]

    def pairs():
        return [[dout, q, k, v, hadamard(q), hadamard(k)] for q, k, v, dout in bench.sets(seq, 4)]

    yield Operator("l2_normalize", seq, rows, subquad.l2_normalize)
    yield Operator("lsh_hash hadamard", seq, rows, hadamard, 0)
    yield Operator("lsh_hash gaussian", seq, rows, gaussian, 1e-3)
    yield Operator("bucket_sort", seq, codes, lambda x: subquad.bucket_sort(x, BUCKETS), 0)
    yield Operator("bucket_attention", seq, rows_and_codes, attend)
    yield Operator("bucket_attention causal", seq, rows_and_codes, lambda *x: attend(*x, is_causal=True))
    yield Operator("bucket_attention_bwd", seq, rows_and_codes, lambda *x: subquad.bucket_attention_bwd(*x, BUCKETS))
    yield Operator(
        "bucket_gradient", seq, pairs, lambda *x: subquad.bucket_gradient(*x, BITS, seed=1), checks.GRADIENT_LIMIT
    )
    yield Operator(
        "collision_attention", short, lambda: bench.sets(short), lambda *x: subquad.collision_attention(*x, BITS), 1e-2
    )
    yield Operator(
        "collision_attention_bwd", short, lambda: bench.sets(short, 4),
        lambda *x: subquad.collision_attention_bwd(*x, BITS), checks.GRADIENT_LIMIT,
    )  # fmt: skip
