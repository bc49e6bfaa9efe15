"""Weighted sums of arrays, over items and groups of heads too."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import sum_arrays as ref

SHAPES = {  # shapes of the terms, and what is asked for
    "one": ([(2, 4, 7, 5)], {}),
    "four": ([(2, 3, 17, 33)] * 4, dict(factors=[1, -2, 0.5, 3])),
    "groups": ([(2, 2, 7, 5), (2, 6, 7, 5)], dict(factors=[1, 0.25])),
    "items": ([(3, 4, 7, 5), (1, 4, 7, 5)], dict(batch=1, heads=2)),
    "everything": ([(3, 4, 7, 200)], dict(batch=1, heads=1)),
    "tiny": ([(1, 1, 1, 1)] * 2, {}),
}


def terms(name, dtypes=("float32",)):
    rng = np.random.default_rng(0)
    shapes, keywords = SHAPES[name]
    return [as_dtype(rng.standard_normal(s), dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)], keywords


def expected(arrays, keywords):
    return Expected(lambda *terms, **given: ref.sum_arrays(terms, **given), arrays, keywords)


@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_reference(name, isa):
    arrays, keywords = terms(name)
    expected(arrays, keywords).check(subquad.sum_arrays(arrays, **keywords), name)
    views = [strided(x) for x in arrays]
    np.testing.assert_array_equal(subquad.sum_arrays(views, **keywords), subquad.sum_arrays(arrays, **keywords))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    for dtypes in ((dtype,), (dtype, "float32")):  # the result is like the first term
        arrays, keywords = terms("groups", dtypes)
        got = within(framework, lambda *given, keywords=keywords: subquad.sum_arrays(given, **keywords), arrays, {})
        expected(arrays, keywords).check(got, dtype, dtype)


def test_in_place_converted_and_empty(isa):
    (x, y, *_), _ = terms("four")
    total = subquad.sum_arrays([x, y])
    assert subquad.sum_arrays([x, y], out=x) is x
    np.testing.assert_array_equal(x, total)
    half = subquad.sum_arrays([y], out=np.zeros(y.shape, np.float16))
    np.testing.assert_array_equal(half, y.astype(np.float16))
    assert subquad.sum_arrays([y[:, :, :0]]).shape == (2, 3, 0, 33)
    assert (subquad.sum_arrays([y[:0]], batch=1) == 0).all()


def test_wrong_terms_raise():
    x = np.ones((2, 4, 7, 5), np.float32)
    for terms, keywords in (
        ([], {}),
        ([x] * 5, {}),
        ([x, x[:, :3]], {}),
        ([x], dict(heads=3)),
        ([x, x], dict(factors=[1])),
    ):
        with pytest.raises(ValueError, match=r"^\[sum_arrays\] "):
            subquad.sum_arrays(terms, **keywords)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(factors=3), ValueError, "factors: expected 1 of them, one per term, got int"),
        (dict(factors=[1.0, 2.0]), ValueError, "factors: expected 1 of them, one per term, got 2"),
        (dict(factors=["a"]), TypeError, "factors: expected a number, got str"),
        (dict(batch=-1), ValueError, "batch: expected a value of at least 0, got -1"),
        (dict(heads=1.5), TypeError, "heads: expected an integer, got float"),
    ],
)
def test_bad_inputs(keywords, error, message):
    with pytest.raises(error) as caught:
        subquad.sum_arrays([np.ones((1, 2, 3, 4), np.float32)], **keywords)
    assert str(caught.value).startswith("[sum_arrays] ") and message in str(caught.value)
