"""Columns spread over keys: bit by bit those of the reference, and the map of columns itself."""

import math
from fractions import Fraction

import numpy as np
import pytest

import subquad
from budgets import within
from cases import strided
from ref import expand_values as ref
from sparse_cases import masks

SIZES = [(3, 2, 9, 20, 8), (1, 1, 1, 1, 1), (2, 3, 12, 7, 33), (1, 2, 5, 300, 96), (2, 1, 40, 23, 64)]


def values(batch, heads, seq_q, columns):
    return np.random.default_rng(0).standard_normal((batch, heads, seq_q, columns)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_the_reference(size, masked, causal, isa):
    batch, heads, seq_q, seq_k, columns = size
    x, keywords = values(batch, heads, seq_q, columns), masks(batch, seq_q, seq_k, masked, causal)
    got = subquad.expand_values(x, seq_k, **keywords)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, ref.expand_values(x, seq_k, **keywords))
    np.testing.assert_array_equal(subquad.expand_values(strided(x), seq_k, **keywords), got)


def test_every_framework(framework):
    x, keywords = values(3, 2, 9, 8), masks(3, 9, 20, causal=True)
    (got,) = within(framework, lambda x, **given: subquad.expand_values(x, 20, **given), (x,), keywords)
    np.testing.assert_array_equal(got, ref.expand_values(x, 20, **keywords))


@pytest.mark.parametrize("columns", [7, 64, 96, 128])
def test_the_map_of_columns_is_exact(columns, isa):
    """Column of token j of n: the one in whose span of n / K tokens the middle of the token is."""
    x = np.arange(columns, dtype=np.float32)[None, None, None]
    for count in (1, 2, columns - 1, columns, columns + 1, 1000, 8191, 16384):
        got = subquad.expand_values(x, count)[0, 0, 0].astype(int)
        assert (np.diff(got) >= 0).all() and len(np.unique(got)) == min(count, columns)
        for j in range(0, count, 1 if count < 200 else 37):
            assert got[j] == math.ceil(Fraction(2 * j + 1, 2) * columns / count) - 1
        if count == columns:
            np.testing.assert_array_equal(got, np.arange(columns))


def test_products_beyond_32_bits(isa):
    """2 c n needs 64 bits: a million tokens, 4096 columns."""
    x = np.arange(4096, dtype=np.float32)[None, None, None]
    got = subquad.expand_values(x, 2**20 + 1)[0, 0, 0].astype(np.int64)
    j = np.arange(2**20 + 1)
    np.testing.assert_array_equal(got, ((2 * j + 1) * 4096 - 1) // (2 * (2**20 + 1)))


def test_causal_rows_repeat_the_map_of_their_own_length(isa):
    x = np.broadcast_to(np.arange(6, dtype=np.float32), (1, 1, 30, 6)).copy()
    got = subquad.expand_values(x, 30, is_causal=True)
    for n in range(30):
        alone = subquad.expand_values(x[:, :, :1], n + 1)
        np.testing.assert_array_equal(got[0, 0, n, : n + 1], alone[0, 0, 0])
        assert (got[0, 0, n, n + 1 :] == 0).all()


def test_nan_stays_in_its_column_and_row(isa):
    x, keywords = values(3, 2, 9, 8), masks(3, 9, 20)
    x[:, :, 4, 5] = np.nan
    x[np.broadcast_to(~keywords["query_mask"][:, None], x.shape[:3])] = np.nan
    np.testing.assert_array_equal(subquad.expand_values(x, 20, **keywords), ref.expand_values(x, 20, **keywords))


def test_nothing(isa):
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)):
        assert subquad.expand_values(np.ones(shape, np.float32), 7).shape == (*shape[:3], 7)
    assert subquad.expand_values(np.ones((2, 2, 3, 4), np.float32), 0).shape == (2, 2, 3, 0)
    assert (subquad.expand_values(values(2, 2, 3, 4), 7, key_mask=np.zeros((2, 7), bool)) == 0).all()
