"""Sampled gradients: the reference draw for draw, and unbiased."""

import time

import numpy as np
import pytest

import subquad
from cases import CASES, DTYPES, arrays, as_dtype
from ref import bucket_gradient as ref
from tolerance import assert_budget, redrawn_floor, round_to

BY_NAME = {case.name: case for case in CASES}


def problem(case, bits, hashes, seed=0, dtype="float32"):
    q, k, v, masks = arrays(case, seed, dtype)
    planes = subquad.random_normal((hashes, bits, case.dim), seed=seed)
    dout = as_dtype(np.random.default_rng(seed + 1).standard_normal((*q.shape[:3], case.dim_v)), dtype)
    return dout, q, k, v, subquad.lsh_hash(q, planes), subquad.lsh_hash(k, planes), masks


@pytest.mark.backends
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rule", ["lower_bound", "exact"])
@pytest.mark.parametrize(("bits", "hashes", "samples"), [(2, 5, 3), (5, 3, 64), (18, 2, 4)])
def test_matches_the_reference(case, rule, bits, hashes, samples, isa):
    dout, q, k, v, codes_q, codes_k, masks = problem(case, bits, hashes)
    got = subquad.bucket_gradient(
        dout, q, k, v, codes_q, codes_k, bits, grad=rule, num_samples=samples, seed=77, **masks
    )
    wide = [x.astype(np.float64) for x in (dout, q, k, v)]
    keywords = dict(rule=rule, num_samples=samples, seed=77, **masks)
    codes = codes_q.astype(np.int64), codes_k.astype(np.int64)
    exact = ref.bucket_gradient(*wide, *codes, bits, **keywords)
    plain = ref.bucket_gradient(*wide, *codes, bits, **keywords, dtype=np.float32)
    floors = redrawn_floor(
        lambda q, k: ref.bucket_gradient(wide[0], q, k, wide[3], *codes, bits, **keywords, dtype=np.float32),
        *wide[1:3],
        exact,
        gradients=(0, 1),
    )
    for name, actual, truth, rounded, floor in zip(("dq", "dk"), got, exact, plain, floors, strict=True):
        assert_budget(actual, truth, rounded, floor=floor, what=f"{name} {case}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    if dtype == "bfloat16" and framework.name == "numpy":
        pytest.skip("the case is covered by torch and jax")
    dout, q, k, v, codes_q, codes_k, masks = problem(BY_NAME["masked_grouped"], 4, 3, dtype=dtype)
    given = {name: framework.make(m) if isinstance(m, np.ndarray) else m for name, m in masks.items()}
    got = subquad.bucket_gradient(*framework.arrays(dout, q, k, v, codes_q, codes_k), 4, seed=7, **given)
    wide = [x.astype(np.float64) for x in (dout, q, k, v)]
    codes = codes_q.astype(np.int64), codes_k.astype(np.int64)
    exact = ref.bucket_gradient(*wide, *codes, 4, rule="lower_bound", num_samples=4, seed=7, **masks)
    for actual, truth in zip(got, exact, strict=True):
        floor = 2e-6 * np.abs(truth).max()
        assert_budget(framework.read(actual), truth, round_to(truth, dtype), dtype=dtype, floor=floor)


@pytest.mark.backends
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dout_dtype", DTYPES)
def test_dout_of_another_dtype(dtype, dout_dtype, isa):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    dout, q, k, v, codes_q, codes_k, masks = problem(BY_NAME["causal_masked_grouped"], 3, 4, dtype=dtype)
    dout = as_dtype(dout.astype(np.float32), dout_dtype)
    got = subquad.bucket_gradient(dout, q, k, v, codes_q, codes_k, 3, seed=9, **masks)
    wide = [x.astype(np.float64) for x in (dout, q, k, v)]
    codes = codes_q.astype(np.int64), codes_k.astype(np.int64)
    exact = ref.bucket_gradient(*wide, *codes, 3, rule="lower_bound", num_samples=4, seed=9, **masks)
    for actual, truth in zip(got, exact, strict=True):
        floor = 2e-6 * np.abs(truth).max()
        assert_budget(actual, truth, round_to(truth, dtype), dtype=dtype, floor=floor)


@pytest.mark.backends
@pytest.mark.parametrize("rule", ["lower_bound", "exact"])
def test_one_bucket_for_all_keys_stays_linear(rule, isa):
    # On a CPU all pairs of 40000 rows would be 1.6e9 evaluations a hash.
    n = 1000 if isa == "cuda_emulated" else 40_000
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, n, 16)).astype(np.float32)
    codes = np.zeros((1, 1, 2, n), np.uint16)
    start = time.monotonic()
    dq, dk = subquad.bucket_gradient(x, x, x, x, codes, codes, 8, grad=rule)
    assert time.monotonic() - start < 20, "some 100 ms is linear, minutes are not"
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


@pytest.mark.backends
def test_a_row_without_gradient_gets_none(isa):
    dout, q, k, v, codes_q, codes_k, _ = problem(BY_NAME["plain"], 2, 4)
    dout[:, :, 5] = 0
    q[:, :, 6] = 0
    dq, _ = subquad.bucket_gradient(dout, q, k, v, codes_q, codes_k, 2)
    assert (dq[:, :, 5:7] == 0).all() and (dq[:, :, 7] != 0).any()


@pytest.mark.statistical
@pytest.mark.parametrize("rule", ["lower_bound", "exact"])
def test_unbiased_over_codes_and_pairs(rule):
    """z test over 2 x 96 gradient entries and 4000 draws of planes and pairs; |z| <= 4.5 errs with 1.3e-3."""
    rng = np.random.default_rng(8)
    q, k, v, dout = (rng.standard_normal((1, 1, 12, 8)).astype(np.float32) for _ in range(4))
    q += 1.5 * k
    bits, draws = 3, 4000
    exact = subquad.collision_attention_bwd(dout, q, k, v, bits, grad=rule)[:2]
    total = [np.zeros(q.shape), np.zeros(q.shape)]
    squares = [np.zeros(q.shape), np.zeros(q.shape)]
    for seed in range(draws):
        planes = subquad.random_normal((2, bits, 8), seed=seed)
        codes = subquad.lsh_hash(q, planes), subquad.lsh_hash(k, planes)
        got = subquad.bucket_gradient(dout, q, k, v, *codes, bits, grad=rule, num_samples=1, seed=seed)
        for side in range(2):
            total[side] += got[side]
            squares[side] += got[side].astype(np.float64) ** 2
    for side in range(2):
        mean = total[side] / draws
        error = np.sqrt((squares[side] / draws - mean**2) / draws)
        assert (np.abs(mean - exact[side]) <= 4.5 * error + 1e-6).all()
