"""Segment means against their reference: counts exactly, means within one rounding and the order of a sum."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import segment_mean as ref

SHAPES = [(2, 3, 20, 16), (1, 1, 1, 1), (3, 2, 51, 33), (1, 1, 7, 200)]
CUTS = [dict(num_segments=1), dict(num_segments=7), dict(num_segments=60), dict(segment_size=1), dict(segment_size=6),
        dict(segment_size=64)]  # fmt: skip


def tokens(shape, masked, dtype="float32"):
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal(shape), rng.random((shape[0], shape[2])) < 0.6
    mask[-1, : shape[2] // 2] = False
    if not masked:
        return as_dtype(x, dtype), {}
    x[np.broadcast_to(~mask[:, None], shape[:3])] = np.nan
    return as_dtype(x, dtype), dict(mask=mask)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(shape, cut, masked, isa):
    x, keywords = tokens(shape, masked)
    keywords |= cut
    out, counts = subquad.segment_mean(x, return_counts=True, **keywords)
    exact, exact_counts = ref.segment_mean(x, return_counts=True, **keywords)
    np.testing.assert_array_equal(counts, exact_counts)
    assert counts.dtype == np.int32
    Expected(ref.segment_mean, (x,), keywords).check(out, str(cut))
    np.testing.assert_array_equal(subquad.segment_mean(strided(x), **keywords), out)
    rng = np.random.default_rng(1)
    dout, base = (rng.standard_normal(y.shape).astype(np.float32) for y in (out, x))
    for more in ({}, dict(base=base)):
        expected = Expected(
            lambda dout, more=more, **k: ref.segment_mean_bwd(dout, shape[2], **more, **k), (dout,), keywords
        )
        expected.check(subquad.segment_mean_bwd(dout, shape[2], **more, **keywords), str(cut))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    x, keywords = tokens((2, 3, 20, 16), True, dtype)
    keywords |= dict(num_segments=4, paired_mask=np.ones((2, 3), bool))
    got, counts = within(framework, subquad.segment_mean, (x,), keywords | dict(return_counts=True))
    Expected(ref.segment_mean, (x,), keywords).check(got, dtype, dtype)
    np.testing.assert_array_equal(counts, ref.segment_mean(x, return_counts=True, **keywords)[1])
    dout = as_dtype(np.random.default_rng(1).standard_normal((2, 3, 4, 16)), dtype)
    got = within(framework, lambda dout, **given: subquad.segment_mean_bwd(dout, 20, **given), (dout,), keywords)
    expected = Expected(lambda dout, **given: ref.segment_mean_bwd(dout, 20, **given), (dout,), keywords)
    expected.check(got, dtype, dtype)


def test_padding_changes_no_bit(isa):
    """Segments are counted in valid tokens: holes and padding leave the means of an item as they are."""
    x, _ = tokens((1, 2, 20, 16), False)
    padded = np.full((1, 2, 33, 16), np.nan, np.float32)
    mask = np.zeros((1, 33), bool)
    mask[0, np.sort(np.random.default_rng(2).permutation(33)[:20])] = True
    padded[:, :, mask[0]] = x
    out = subquad.segment_mean(x, 6)
    np.testing.assert_array_equal(subquad.segment_mean(padded, 6, mask=mask), out)
    dx = subquad.segment_mean_bwd(out, 33, 6, mask=mask)
    np.testing.assert_array_equal(dx[:, :, mask[0]], subquad.segment_mean_bwd(out, 20, 6))
    assert (dx[:, :, ~mask[0]] == 0).all()


def test_paired_items_get_equally_many_segments(isa):
    rng = np.random.default_rng(3)
    x, y = np.ones((4, 1, 9, 5), np.float32), np.ones((4, 1, 6, 5), np.float32)
    mask_x, mask_y = rng.random((4, 9)) < 0.5, rng.random((4, 6)) < 0.5
    mask_x[0] = False
    counts = [
        subquad.segment_mean(a, 3, mask=own, paired_mask=other, return_counts=True)[1] > 0
        for a, own, other in ((x, mask_x, mask_y), (y, mask_y, mask_x))
    ]
    np.testing.assert_array_equal(counts[0], counts[1])
    np.testing.assert_array_equal(counts[0].sum(1), np.minimum(3, np.minimum(mask_x.sum(1), mask_y.sum(1))))


def test_empty_axes(isa):
    for shape in ((0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)):
        out, counts = subquad.segment_mean(np.ones(shape, np.float32), 3, return_counts=True)
        assert out.shape == (*shape[:2], 3, 4) and (shape[2] or ((out == 0).all() and (counts == 0).all()))
        assert subquad.segment_mean_bwd(out, shape[2], 3).shape == shape
    with pytest.raises(ValueError, match=r"^\[segment_mean\] num_segments: expected a value of at least 1, got 0"):
        subquad.segment_mean(np.ones((2, 2, 5, 4), np.float32), 0)
