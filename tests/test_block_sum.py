"""Sums over the keys of columns against their reference."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import strided
from ref import block_sum as ref
from sparse_cases import masks
from tolerance import sum_floor

SIZES = [(3, 2, 9, 20, 8), (1, 1, 1, 1, 1), (2, 3, 12, 7, 33), (1, 2, 5, 300, 96), (1, 1, 6, 3000, 2)]


def values(batch, heads, seq_q, seq_k):
    return np.random.default_rng(0).standard_normal((batch, heads, seq_q, seq_k)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_the_reference(size, masked, causal, isa):
    *shape, columns = size
    y, keywords = values(*shape), masks(shape[0], *shape[2:], masked, causal)
    got = subquad.block_sum(y, columns, **keywords)
    expected = Expected(lambda y, **given: ref.block_sum(y, columns, **given), (y,), keywords)
    # eps times the sum of the sizes of what the largest block adds up
    expected.check(got, str(size), floors=sum_floor(ref.block_sum(np.abs(y), columns, **keywords)))
    np.testing.assert_array_equal(subquad.block_sum(strided(y), columns, **keywords), got)


def test_every_framework(framework):
    y, keywords = values(3, 2, 9, 20), masks(3, 9, 20, causal=True)
    got = within(framework, lambda y, **given: subquad.block_sum(y, 8, **given), (y,), keywords)
    Expected(lambda y, **given: ref.block_sum(y, 8, **given), (y,), keywords).check(got, floors=1e-6)


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_is_the_adjoint_of_expand_values(size, causal, isa):
    batch, heads, seq_q, seq_k, columns = size
    x = np.random.default_rng(1).standard_normal((batch, heads, seq_q, columns)).astype(np.float32)
    y, keywords = values(batch, heads, seq_q, seq_k), masks(batch, seq_q, seq_k, causal=causal)
    wide = subquad.expand_values(x, seq_k, **keywords).astype(np.float64)
    sums = subquad.block_sum(y, columns, **keywords).astype(np.float64)
    scale = np.abs(wide * y).sum() + 1e-30
    assert abs((wide * y).sum() - (x * sums).sum()) <= 1e-6 * scale


def test_widths_of_blocks_and_sums_over_all(isa):
    for count in (1, 5, 8, 9, 1000):
        widths = subquad.block_sum(np.ones((1, 1, 1, count), np.float32), 8)[0, 0, 0]
        assert widths.sum() == count and widths.min() >= count // 8 and widths.max() <= -(-count // 8)


def test_what_is_not_seen_may_be_nan(isa):
    y, keywords = values(3, 2, 9, 20), masks(3, 9, 20, causal=True)
    got = subquad.block_sum(y, 8, **keywords)
    seen = ref.block_membership(3, 9, 20, 8, **keywords).any(axis=3)
    np.testing.assert_array_equal(subquad.block_sum(np.where(seen, y, np.float32(np.nan)), 8, **keywords), got)
    assert (got[2] == 0).all() and (got[~np.broadcast_to(seen.any(axis=-1), got.shape[:3])] == 0).all()


def test_nothing(isa):
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        got = subquad.block_sum(np.ones(shape, np.float32), 7)
        assert got.shape == (*shape[:3], 7) and (shape[3] or (got == 0).all())
