"""Inner products of rows."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import row_dot as ref


def rows(shape, dtype="float32"):
    rng = np.random.default_rng(0)
    return [as_dtype(rng.standard_normal(shape), dtype) for _ in range(3)]


@pytest.mark.parametrize("shape", [(2, 3, 20, 16), (1, 1, 1, 1), (1, 2, 37, 33), (1, 1, 5, 512)], ids=str)
def test_matches_the_reference(shape, isa):
    x, y, z = rows(shape)
    Expected(ref.row_dot, (x, y, z)).check(subquad.row_dot(x, y, z), "with z")
    Expected(ref.row_dot, (x, y)).check(subquad.row_dot(x, y), "without z")
    np.testing.assert_array_equal(subquad.row_dot(strided(x), strided(y)), subquad.row_dot(x, y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    given = rows((2, 3, 20, 16), dtype)
    Expected(ref.row_dot, given).check(within(framework, subquad.row_dot, given, {}), dtype)


def test_empty_axes(isa):
    x = np.ones((2, 0, 3, 4), np.float32)
    assert subquad.row_dot(x, x).shape == (2, 0, 3)
