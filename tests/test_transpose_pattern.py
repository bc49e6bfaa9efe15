"""The transpose of a pattern: exactly that of the reference."""

import numpy as np
import pytest

import subquad
from ref import transpose_pattern as ref
from ref.patterns import Csr
from sparse_cases import public, random_csr

SIZES = [(2, 3, 5, 7), (1, 1, 1, 1), (2, 2, 40, 3), (1, 2, 3, 200), (1, 1, 300, 300)]


def check(csr):
    got = subquad.transpose_pattern(public(csr))
    for actual, exact in zip(got, ref.transpose_pattern(csr), strict=True):
        assert actual.dtype == exact.dtype
        np.testing.assert_array_equal(actual, exact)
    return got


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_matches_the_reference(size, index, isa):
    for density in (0.0, 0.3, 1.0):
        check(random_csr(*size, density, index=index))


def test_turns_back(isa):
    csr = random_csr(2, 3, 11, 6)
    indptr, rows, order = check(csr)
    again = check(Csr(indptr, rows, (2, 3, 6, 11)))
    np.testing.assert_array_equal(again[0], csr.indptr)
    np.testing.assert_array_equal(again[1], csr.indices)
    np.testing.assert_array_equal(order[again[2]], np.arange(len(order)))


def test_nothing(isa):
    for size in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        count = int(np.prod(size[:3]))
        check(Csr(np.zeros(count + 1, np.int64), np.zeros(0, np.int32), size))


def test_every_framework(framework):
    csr = random_csr(2, 3, 5, 7, index=np.int32)
    got = subquad.transpose_pattern(public(csr, framework.make))
    for actual, exact in zip(got, ref.transpose_pattern(csr), strict=True):
        np.testing.assert_array_equal(framework.read(actual), exact)


def test_foreign_patterns_are_checked(isa):
    indptr, indices = np.array([0, 2, 3, 3], np.int64), np.array([0, 3, 1], np.int32)
    subquad.transpose_pattern(subquad.CsrPattern(indptr, indices, (1, 1, 3, 4)))
    wrong = [
        (indptr[::-1].copy(), indices), (indptr + 1, indices), (indptr, indices - 1), (indptr, indices + 1),
        (indptr, indices[[1, 0, 2]]), (indptr, indices[[0, 0, 2]]), (indptr, indices[:2]), (indptr[:3], indices),
    ]  # fmt: skip
    for starts, keys in wrong:
        with pytest.raises(ValueError, match=r"^\[\w+\] \w+: expected"):
            subquad.transpose_pattern(subquad.CsrPattern(starts, keys, (1, 1, 3, 4)))
