"""Rows of unit length, the logarithm of their length, and the gradient."""

import numpy as np
import pytest

import subquad
from cases import DTYPES, as_dtype
from ref import l2_normalize as ref
from tolerance import assert_budget, round_to


@pytest.mark.backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 16), (1, 1, 1, 1), (1, 2, 5, 33), (1, 1, 3, 512), (0, 2, 3, 4), (2, 2, 0, 4)]
)
def test_forward_and_backward_match_the_reference(shape, dtype, isa):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    if isa.startswith("cuda") and shape[3] > 256:
        pytest.skip("CUDA kernels take head dimensions up to 256")
    rng = np.random.default_rng(0)
    x = as_dtype(rng.standard_normal(shape), dtype)
    if shape[2] > 2:
        x[:, :, 1] = 0
    y, lse = subquad.l2_normalize(x, return_lse=True)
    exact, exact_lse = ref.l2_normalize(x.astype(np.float64))
    assert_budget(np.asarray(y, np.float32), exact, round_to(exact, dtype), dtype=dtype, floor=2e-7)
    np.testing.assert_allclose(lse, exact_lse, rtol=3e-7, atol=2e-7)
    dy = as_dtype(rng.standard_normal(shape), dtype)
    dx = subquad.l2_normalize_bwd(dy, y, lse)
    truth = ref.l2_normalize_bwd(dy.astype(np.float64), y.astype(np.float64), lse.astype(np.float64))
    assert_budget(
        np.asarray(dx, np.float32),
        truth,
        round_to(truth, dtype),
        dtype=dtype,
        floor=1e-6 * np.abs(truth).max(initial=0),
    )


@pytest.mark.backends
@pytest.mark.parametrize("exponent", [-149, -130, -80, 80, 120, 127])
def test_no_row_overflows(exponent, isa):
    x = np.ldexp(np.array([1.0, -0.75, 0.5, 0.875] * 4), exponent).astype(np.float32).reshape(1, 1, 1, 16)
    y, lse = subquad.l2_normalize(x, return_lse=True)
    exact, exact_lse = ref.l2_normalize(x.astype(np.float64))
    np.testing.assert_allclose(y, exact, rtol=1e-6)
    np.testing.assert_allclose(lse, exact_lse, rtol=3e-7)


@pytest.mark.backends
def test_in_place(isa):
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 33)).astype(np.float32)
    expected = subquad.l2_normalize(x.copy())
    assert subquad.l2_normalize(x, out=x) is x
    np.testing.assert_array_equal(x, expected)
