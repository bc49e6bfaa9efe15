"""Tokens grouped by bucket: exactly the reference's permutation."""

import numpy as np
import pytest

import subquad
from cases import strided
from ref import bucket_sort as ref


@pytest.mark.parametrize("seq", [0, 1, 2, 17, 300])
@pytest.mark.parametrize("bits", [1, 4, 9, 16, 20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.backends
def test_matches_the_reference(seq, bits, masked, isa):
    rng = np.random.default_rng(seq + bits)
    codes = rng.integers(0, 1 << bits, (2, 2, 3, seq)).astype(np.uint16 if bits <= 16 else np.int32)
    mask = rng.random((2, seq)) < 0.6 if masked else None
    order, offsets = subquad.bucket_sort(codes, 1 << bits, mask=mask)
    expected = ref.bucket_sort(codes.astype(np.int64), 1 << bits, mask)
    np.testing.assert_array_equal(order, expected[0])
    np.testing.assert_array_equal(offsets, expected[1])


@pytest.mark.parametrize("bits", [8, 16, 19])
@pytest.mark.backends
def test_long_rows_match_the_reference(bits, isa):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (1, 1, 1, 17000)).astype(np.uint16 if bits <= 16 else np.int32)
    mask = rng.random((1, 17000)) < 0.9
    order, offsets = subquad.bucket_sort(codes, 1 << bits, mask=mask)
    expected = ref.bucket_sort(codes.astype(np.int64), 1 << bits, mask)
    np.testing.assert_array_equal(order, expected[0])
    np.testing.assert_array_equal(offsets, expected[1])


@pytest.mark.backends
def test_one_bucket_and_strides(isa):
    codes = np.full((1, 2, 3, 50), 7, np.int32)
    order, offsets = subquad.bucket_sort(strided(codes), 8)
    np.testing.assert_array_equal(order, np.broadcast_to(np.arange(50), order.shape))
    assert (offsets[..., :8] == 0).all() and (offsets[..., 8] == 50).all()


def test_num_buckets_need_not_be_a_power_of_two(framework):
    codes = np.array([4, 0, 2, 4, 1], np.int32).reshape(1, 1, 1, 5)
    order, offsets = subquad.bucket_sort(framework.make(codes), 5)
    np.testing.assert_array_equal(np.asarray(order).ravel(), [1, 4, 2, 0, 3])
    np.testing.assert_array_equal(np.asarray(offsets).ravel(), [0, 1, 2, 3, 3, 5])
