"""The dense expectation and its gradients, against the reference."""

import numpy as np
import pytest

import subquad
from cases import CASES, DTYPES, arrays, as_dtype
from ref import collision_attention as ref
from tolerance import assert_budget, redrawn_floor, round_to

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.backends
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bits", [1, 8, 11])
def test_matches_the_reference(case, bits, isa):
    q, k, v, masks = arrays(case)
    out = subquad.collision_attention(q, k, v, bits, **masks)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact = ref.collision_attention(*wide, bits, **masks)
    plain = ref.collision_attention(*wide, bits, **masks, dtype=np.float32)
    (floor,) = redrawn_floor(
        lambda q, k: ref.collision_attention(q, k, wide[2], bits, **masks, dtype=np.float32), *wide[:2], exact
    )
    assert_budget(out, exact, plain, floor=floor)


@pytest.mark.backends
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("bits", "grad"), [(1, "exact"), (8, "exact"), (8, "lower_bound")])
def test_backward_matches_the_reference(case, bits, grad, isa):
    q, k, v, masks = arrays(case)
    dout = as_dtype(np.random.default_rng(1).standard_normal((*q.shape[:3], case.dim_v)), "float32")
    got = subquad.collision_attention_bwd(dout, q, k, v, bits, grad=grad, **masks)
    wide = [x.astype(np.float64) for x in (dout, q, k, v)]
    exact = ref.collision_attention_bwd(*wide, bits, grad=grad, **masks)
    plain = ref.collision_attention_bwd(*wide, bits, grad=grad, **masks, dtype=np.float32)
    floors = redrawn_floor(
        lambda q, k: ref.collision_attention_bwd(wide[0], q, k, wide[3], bits, grad=grad, **masks, dtype=np.float32),
        *wide[1:3],
        exact,
        gradients=(0, 1),
    )
    for name, actual, truth, rounded, floor in zip(("dq", "dk", "dv"), got, exact, plain, floors, strict=True):
        assert_budget(actual, truth, rounded, floor=floor, what=f"{name} {case}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    q, k, v, masks = arrays(BY_NAME["causal_masked_grouped"], dtype=dtype)
    given = {name: framework.make(m) if isinstance(m, np.ndarray) else m for name, m in masks.items()}
    out = framework.read(subquad.collision_attention(*framework.arrays(q, k, v), 8, **given))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact = ref.collision_attention(*wide, 8, **masks)
    plain = ref.collision_attention(*wide, 8, **masks, dtype=np.float32)
    assert_budget(out, exact, round_to(plain, dtype), dtype=dtype)


@pytest.mark.backends
def test_central_differences(isa):
    case = BY_NAME["tails"]
    q, k, v, _ = arrays(case)
    rng = np.random.default_rng(4)
    dout = rng.standard_normal((*q.shape[:3], case.dim_v)).astype(np.float32)
    gradients = subquad.collision_attention_bwd(dout, q, k, v, 6)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        step = rng.standard_normal(x.shape)
        wide = [a.astype(np.float64) for a in (q, k, v)]
        at = next(i for i, a in enumerate((q, k, v)) if a is x)
        ends = []
        for sign in (1, -1):
            moved = list(wide)
            moved[at] = wide[at] + sign * 1e-5 * step
            ends.append((dout * ref.collision_attention(*moved, 6)).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs((gradient * step).sum() - slope) < 1e-4 * np.sqrt((gradient.astype(np.float64) ** 2).sum())


@pytest.mark.backends
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["causal_masked_grouped", "wide"])
def test_backward_of_16_bit_rows(name, dtype, isa):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    case = BY_NAME[name]
    q, k, v, masks = arrays(case, dtype=dtype)
    dout = as_dtype(np.random.default_rng(1).standard_normal((*q.shape[:3], case.dim_v)), dtype)
    got = subquad.collision_attention_bwd(dout, q, k, v, 8, **masks)
    wide = [x.astype(np.float64) for x in (dout, q, k, v)]
    exact = ref.collision_attention_bwd(*wide, 8, **masks)
    plain = ref.collision_attention_bwd(*wide, 8, **masks, dtype=np.float32)
    for what, actual, truth, rounded in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        assert_budget(actual, truth, round_to(rounded, dtype), dtype=dtype, what=what)


@pytest.mark.backends
@pytest.mark.parametrize("sign", [1, -1])
def test_parallel_rows_are_finite_and_bounded(sign, isa):
    x = as_dtype(np.random.default_rng(5).standard_normal((1, 2, 50, 24)), "float32")
    x[:, :, 10:20] = x[:, :, :10]
    v = np.ones_like(x)
    out = subquad.collision_attention(sign * x, x, v, 9)
    assert np.isfinite(out).all()
    for grad in ("exact", "lower_bound"):
        dq, dk, dv = subquad.collision_attention_bwd(v, sign * x, x, v, 9, grad=grad)
        bound = 50 * 24 * 9 / np.pi / np.linalg.norm(x, axis=-1).min()
        for gradient in (dq, dk):
            assert (
                np.abs(gradient).max() < bound
            )  # t is a unit vector, so no pair adds more than |<g, v>| tau / (pi |q|)
        assert np.isfinite(dv).all()
