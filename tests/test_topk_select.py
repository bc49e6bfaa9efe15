"""Selection of the largest scores of a group: exactly that of the reference, in a total order."""

import numpy as np
import pytest

import subquad
from budgets import within
from cases import DTYPES, as_dtype, strided
from ref import topk_select as ref
from sparse_cases import GROUPS, masks

SHAPES = [(2, 3, 5, 8), (1, 1, 1, 1), (2, 1, 9, 33), (1, 4, 7, 65), (1, 2, 3, 1000)]
COUNTS = [1, 2, 7, 64, 5000]


def scores_of(shape, values="any", dtype="float32"):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    if values == "ties":
        x = np.round(x)
        x[x == 0] = np.where(rng.random((x == 0).sum()) < 0.5, -0.0, 0.0)
    if values == "close":  # neighbours among the numbers of the dtype
        x = as_dtype(np.ones(shape), dtype).view(f"u{as_dtype(x, dtype).dtype.itemsize}")
        return (x + rng.integers(0, 300, shape).astype(x.dtype)).view(as_dtype(np.ones(1), dtype).dtype)
    if values == "denormal":
        x = x * 2.0 ** (-140 if dtype != "float16" else -22)
    if values == "special":
        for value in (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0):
            x[rng.random(shape) < 0.15] = value
    return as_dtype(x, dtype)


def check(scores, k, **keywords):
    got = subquad.topk_select(scores, k, **keywords)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, ref.topk_select(scores, k, **keywords))
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(shape, group, masked, isa):
    for causal in (False, True):
        keywords = dict(group=group, is_causal=causal)
        mask = masks(shape[0], shape[2], shape[3], masked).get("key_mask")
        for k in COUNTS[: 4 if np.prod(shape) > 2000 else 5]:
            check(scores_of(shape), k, key_mask=mask, **keywords)


@pytest.mark.parametrize("values", ["ties", "close", "denormal", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_special_values(values, dtype, isa):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    scores = scores_of((2, 3, 7, 50), values, dtype)
    for group in GROUPS:
        for k in (1, 20, 45, 149, 1049):
            check(scores, k, group=group)
    np.testing.assert_array_equal(
        subquad.topk_select(strided(scores), 9, group="row_heads"), check(scores, 9, group="row_heads")
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    scores = scores_of((3, 2, 6, 11), "special", dtype)
    keywords = dict(group="row_heads", key_mask=masks(3, 6, 11)["key_mask"], is_causal=True)
    (got,) = within(framework, lambda x, **given: subquad.topk_select(x, 5, **given), (scores,), keywords)
    np.testing.assert_array_equal(got, ref.topk_select(scores, 5, **keywords))


# Laws


@pytest.mark.parametrize("length", [129, 1000, 5000])
def test_long_rows(length, isa):
    """Selected are at least what is left out; equal columns behind the others change nothing."""
    scores = scores_of((1, 2, 3, length))
    for k in (1, 64, length // 2, length):
        got = check(scores, k)
        taken = np.zeros(scores.shape, bool)
        np.put_along_axis(taken, got, True, axis=-1)
        assert (taken.sum(axis=-1) == k).all()
        least = np.where(taken, scores, np.inf).min(axis=-1)
        assert (least >= np.where(taken, -np.inf, scores).max(axis=-1)).all()
        more = np.concatenate([scores, np.broadcast_to(least[..., None], (*scores.shape[:3], 9))], axis=-1)
        np.testing.assert_array_equal(subquad.topk_select(more, k), got)


def test_what_is_not_seen_has_no_effect(isa):
    scores = scores_of((2, 2, 6, 11))
    keywords = dict(group="query", key_mask=masks(2, 6, 11)["key_mask"], is_causal=True)
    got = check(scores, 3, **keywords)
    seen = ref.visible_pairs(2, 6, 11, keywords["key_mask"], None, True)
    for value in (np.nan, np.inf):
        np.testing.assert_array_equal(
            subquad.topk_select(np.where(seen, scores, np.float32(value)), 3, **keywords), got
        )


def test_edges(isa):
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        for group in GROUPS:
            check(np.ones(shape, np.float32), 2, group=group)
    scores = scores_of((2, 2, 5, 7))
    assert (check(scores, 3, key_mask=np.zeros((2, 7), bool)) == -1).all()
    given = np.zeros((2, 2, 5, 3), np.int32)
    assert subquad.topk_select(scores, 3, out=given) is given
    np.testing.assert_array_equal(given, ref.topk_select(scores, 3))
    with pytest.raises(ValueError, match=r"^\[topk_select\] k: expected"):
        subquad.topk_select(scores, 0)
    with pytest.raises(ValueError, match=r"^\[topk_select\] group: expected"):
        subquad.topk_select(scores, 1, group="rows")
