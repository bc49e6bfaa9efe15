"""Sums over equal codes and their transpose, against the reference."""

import time

import numpy as np
import pytest

import subquad
from cases import CASES, DTYPES, Case, arrays, as_dtype, strided
from ref import bucket_attention as ref
from tolerance import assert_budget, round_to

# More pairs of tokens than a GPU compares one by one.
LONG = dict(batch=1, heads=2, heads_kv=1, seq_q=700, seq_k=400, dim_v=40, masked=True)
CASES = [*CASES, Case("long", **LONG), Case("long_causal", **LONG, causal=True)]
BY_NAME = {case.name: case for case in CASES}
CODES = {"tables": (4, 5, np.uint16), "ranks": (16, 3, np.uint16), "ranks_24": (24, 2, np.int32)}


def problem(case, kind, seed=0, dtype="float32"):
    bits, hashes, code_type = CODES[kind]
    rng = np.random.default_rng(seed)
    codes_k = rng.integers(0, 1 << bits, (case.batch, case.heads_kv, hashes, case.seq_k)).astype(code_type)
    codes_q = rng.integers(0, 1 << bits, (case.batch, case.heads, hashes, case.seq_q)).astype(code_type)
    shared = rng.integers(0, case.seq_k, codes_q.shape)
    hit = np.take_along_axis(np.repeat(codes_k, case.heads // case.heads_kv, axis=1), shared, axis=3)
    codes_q = np.where(rng.random(codes_q.shape) < 0.5, hit, codes_q).astype(code_type)
    _, _, v, masks = arrays(case, seed, dtype)
    return codes_q, codes_k, v, 1 << bits, masks


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.backends
def test_matches_the_reference(case, kind, isa):
    codes_q, codes_k, v, buckets, masks = problem(case, kind)
    out = subquad.bucket_attention(codes_q, codes_k, v, buckets, scale=0.25, **masks)
    wide = v.astype(np.float64)
    exact = ref.bucket_attention(codes_q, codes_k, wide, scale=0.25, **masks)
    plain = ref.bucket_attention(codes_q, codes_k, wide, scale=0.25, **masks, dtype=np.float32)
    assert_budget(out, exact, plain, floor=1e-7 * np.abs(exact).max(initial=0) * case.seq_k**0.5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.backends
def test_backward_matches_the_reference(case, kind, isa):
    codes_q, codes_k, _, buckets, masks = problem(case, kind)
    dout = np.random.default_rng(2).standard_normal((*codes_q.shape[:2], case.seq_q, case.dim_v)).astype(np.float32)
    if "query_mask" in masks:
        dout[np.broadcast_to(~masks["query_mask"][:, None], dout.shape[:3])] = np.nan
    dv = subquad.bucket_attention_bwd(dout, codes_q, codes_k, buckets, scale=0.25, **masks)
    exact = ref.bucket_attention_bwd(dout.astype(np.float64), codes_q, codes_k, scale=0.25, **masks)
    plain = ref.bucket_attention_bwd(dout.astype(np.float64), codes_q, codes_k, scale=0.25, **masks, dtype=np.float32)
    assert_budget(dv, exact, plain, floor=1e-7 * np.abs(exact).max(initial=0) * case.seq_q**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    codes_q, codes_k, v, buckets, masks = problem(BY_NAME["causal_masked_grouped"], "tables", dtype=dtype)
    given = {name: framework.make(m) if isinstance(m, np.ndarray) else m for name, m in masks.items()}
    out = subquad.bucket_attention(*framework.arrays(codes_q, codes_k, v), buckets, **given)
    exact = ref.bucket_attention(codes_q, codes_k, v.astype(np.float64), **masks)
    assert_budget(framework.read(out), exact, round_to(exact, dtype), dtype=dtype, floor=1e-6 * np.abs(exact).max())


def test_transpose_is_the_adjoint():
    codes_q, codes_k, v, buckets, masks = problem(BY_NAME["grouped"], "tables")
    g = as_dtype(np.random.default_rng(3).standard_normal((2, 6, 33, 16)), "float32")
    forward = (g.astype(np.float64) * subquad.bucket_attention(codes_q, codes_k, v, buckets, **masks)).sum()
    backward = (v.astype(np.float64) * subquad.bucket_attention_bwd(g, codes_q, codes_k, buckets, **masks)).sum()
    assert abs(forward - backward) < 1e-4 * abs(forward)


@pytest.mark.backends
def test_strides_change_nothing(isa):
    codes_q, codes_k, v, buckets, _ = problem(BY_NAME["tails"], "tables")
    expected = subquad.bucket_attention(codes_q, codes_k, v, buckets)
    out = strided(np.zeros_like(expected))
    subquad.bucket_attention(strided(codes_q), strided(codes_k), strided(v), buckets, out=out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("buckets", "code_type"), [(256, np.uint16), (1 << 24, np.int32)])
def test_one_bucket_for_all_keys_stays_linear(buckets, code_type):
    n = 100_000  # all pairs would be 1e10 row additions
    codes = np.full((1, 1, 2, n), buckets - 1, code_type)
    v = np.ones((1, 1, n, 16), np.float32)
    start = time.monotonic()
    out = subquad.bucket_attention(codes, codes, v, buckets)
    assert time.monotonic() - start < 20, "about 10 ms is linear, minutes are not"
    np.testing.assert_array_equal(out, 2.0 * n)
