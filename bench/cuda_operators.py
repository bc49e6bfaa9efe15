"""The operators that are measured by themselves on a CUDA device: their inputs, calls and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import subquad
from bench import cuda_checks as checks
from bench import cuda_model as model

HASHES, BITS, BUCKETS = 16, 8, 256


@dataclass
class Operator:
    """`make` gives the rotating sets of arrays [B, H, ...], `call` takes one, also on the CPU."""

    name: str
    seq: int
    make: Callable[[], list[list]]
    call: Callable
    work: model.Work
    limit: float = checks.LIMIT


def hadamard(signs: dict, x):
    """`signs` by device."""
    return subquad.lsh_hash(x, signs=signs[x.device.type], num_hashes=HASHES, hash_bits=BITS)


def gaussian(planes: dict, x):
    return subquad.lsh_hash(x, planes=planes[x.device.type])


def with_codes(sets: list[list], hash_rows: Callable, hashed: int) -> list[list]:
    """Behind the arrays of each set the codes of its first `hashed` ones."""
    return [[*arrays, *(hash_rows(x) for x in arrays[:hashed])] for arrays in sets]


def operators(bench, seq: int) -> Iterator[Operator]:
    torch, case, kind = bench.torch, bench.case(seq, hashes=HASHES, bits=BITS), bench.device.kind
    signs, planes = {"cpu": torch.empty(3, 2, 64)}, {"cpu": torch.empty(HASHES, BITS, 64)}
    subquad.random_signs([3, 2, 64], seed=1, out=signs["cpu"])
    subquad.random_normal([HASHES, BITS, 64], seed=1, out=planes["cpu"])
    signs[kind], planes[kind] = signs["cpu"].to(kind), planes["cpu"].to(kind)
    hash_rows = partial(hadamard, signs)

    def arrays(count: int):
        return lambda: bench.sets(seq, count)

    def codes_of(hashed: int, keep: slice):
        return lambda: [x[keep] for x in with_codes(bench.sets(seq, max(hashed, 1)), hash_rows, hashed)]

    def attend_bwd(dout, codes_q, codes_k):
        return subquad.bucket_attention_bwd(dout, codes_q, codes_k, BUCKETS)

    def attend(v, codes_q, codes_k, **keywords):
        return subquad.bucket_attention(codes_q, codes_k, v, BUCKETS, **keywords)

    def pick(q, k, v, dout, codes_q, codes_k):
        return subquad.bucket_gradient(dout, q, k, v, codes_q, codes_k, BITS, seed=1)

    # [rows, codes of queries, codes of keys]; the codes are those of other arrays.
    rows_and_codes = lambda: [  # noqa: E731
        [v, hash_rows(q), hash_rows(k)] for q, k, v in bench.sets(seq)
    ]
    dense = bench.case(bench.seq(4096))
    yield Operator("l2_normalize", seq, arrays(1), subquad.l2_normalize, model.l2_normalize(case))
    yield Operator("lsh_hash hadamard", seq, arrays(1), hash_rows, model.lsh_hash(case), 0)
    yield Operator("lsh_hash gaussian", seq, arrays(1), partial(gaussian, planes), model.lsh_hash_gaussian(case), 1e-3)
    yield Operator(
        "bucket_sort", seq, codes_of(1, slice(1, 2)), lambda c: subquad.bucket_sort(c, BUCKETS),
        model.bucket_sort(case), 0,
    )  # fmt: skip
    yield Operator("bucket_attention", seq, rows_and_codes, attend, model.bucket_attention(case))
    yield Operator(
        "bucket_attention causal", seq, rows_and_codes, partial(attend, is_causal=True), model.bucket_segments(case)
    )
    yield Operator("bucket_attention_bwd", seq, rows_and_codes, attend_bwd, model.bucket_attention(case))
    yield Operator(
        "bucket_gradient", seq, lambda: with_codes(bench.sets(seq, 4), hash_rows, 2), pick,
        model.bucket_gradient(case), checks.GRADIENT_LIMIT,
    )  # fmt: skip
    yield Operator(
        "collision_attention", dense.seq, lambda: bench.sets(dense.seq),
        lambda q, k, v: subquad.collision_attention(q, k, v, BITS), model.collision_attention(dense), 1e-2,
    )  # fmt: skip
    yield Operator(
        "collision_attention_bwd", dense.seq, lambda: bench.sets(dense.seq, 4),
        lambda q, k, v, dout: subquad.collision_attention_bwd(dout, q, k, v, BITS),
        model.collision_attention_bwd(dense), checks.GRADIENT_LIMIT,
    )  # fmt: skip
