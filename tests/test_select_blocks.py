"""Grouped choice of columns: budgets, ties and bits exactly those of the reference."""

import numpy as np
import pytest

import subquad
from budgets import within
from cases import strided
from ref import select_blocks as ref
from ref.patterns import unpack
from sparse_cases import CAUSAL_GROUPS, GROUPS, masks, probabilities

SIZES = [(3, 3, 12, 7), (3, 2, 9, 64), (1, 1, 1, 1), (2, 4, 20, 96), (3, 3, 37, 12)]
TOP_K = [1, 5, 2.5, 64, 1e9]


def check(probs, what="", **keywords):
    """The library's blocks, equal in every field to those of the reference."""
    got, expected = subquad.select_blocks(probs, **keywords), ref.select_blocks(probs, **keywords)
    assert (got.K, got.block_cap, got.num_keys) == (expected.K, expected.block_cap, expected.num_keys), what
    for name in ("bits", "visible", "positions"):
        actual, exact = getattr(got, name), getattr(expected, name)
        assert (actual is None) == (exact is None), what
        if exact is not None:
            assert actual.dtype == exact.dtype, what
            np.testing.assert_array_equal(actual, exact, err_msg=f"{what} {name}")
    return got


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(size, group, masked, isa):
    batch, heads, seq, num_columns = size
    for ties in (False, True):
        probs = probabilities(batch, heads, seq, num_columns, ties=ties)
        for causal in [False, True][: 2 if group in CAUSAL_GROUPS else 1]:
            keywords = masks(batch, seq, seq, masked, causal)
            for top_k in TOP_K:
                budget = "paper" if ties else "code"
                check(probs, f"{causal} {top_k}", top_k=top_k, group=group, budget=budget, **keywords)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("budget", ["code", "paper"])
def test_options(group, budget, isa):
    probs = probabilities(3, 2, 9, 20)
    keywords = dict(group=group, budget=budget)
    for skip_dead in (False, True):
        for masked in (False, True):
            check(probs, top_k=3, skip_dead=skip_dead, **keywords, **masks(3, 9, 9, masked))
    check(probs, top_k=7, num_keys=200, block_cap=4, **keywords)
    check(probs, top_k=7, block_cap=2, **keywords, **masks(3, 9, 31))
    if group in CAUSAL_GROUPS:  # more queries than keys: the first rows see none
        check(probs, top_k=3, num_keys=4, is_causal=True, **keywords)
        check(probs, top_k=3, num_keys=300, is_causal=True, **keywords)


def test_every_framework(framework):
    probs = probabilities(3, 2, 9, 20)
    keywords = masks(3, 9, 9, causal=True) | dict(top_k=3)
    fields = ("bits", "visible", "positions")

    def call(probs, **given):
        blocks = subquad.select_blocks(probs, **given)
        return tuple(getattr(blocks, name) for name in fields)

    expected = ref.select_blocks(probs, **keywords)
    for actual, name in zip(within(framework, call, (probs,), keywords), fields, strict=True):
        np.testing.assert_array_equal(actual, getattr(expected, name), err_msg=name)


# Budgets


def test_budgets_are_those_of_the_exact_rational(isa):
    """Halves, and numbers of keys at which a float32 quotient rounds to the other side."""
    probs = probabilities(1, 3, 2, 64, ties=True)
    for num_keys in (1, 63, 64, 65, 96, 128, 1000, 1024, 8191, 8192, 100003, 2**20, 2**31 - 1):
        for top_k in (1, 7, 12.5, 13, 64, 1.1, 0.1 + 0.2 + 0.7, 1e6 + 1 / 3):
            for group in GROUPS:
                for budget in ("code", "paper"):
                    what = f"{num_keys} {top_k} {group} {budget}"
                    check(probs, what, num_keys=num_keys, top_k=top_k, group=group, budget=budget)
    for top_k in (5, 15):
        halves = check(probabilities(1, 1, 8, 20), top_k=top_k, group="query")
        assert (unpack(halves.bits, 20).sum(axis=-1) == {5: 12, 15: 20}[top_k]).all()


def test_as_many_columns_as_the_budget_and_the_largest(isa):
    probs = probabilities(2, 3, 16, 32, ties=True)
    blocks = check(probs, top_k=4, num_keys=128)  # row_heads: 3 * 4 * 32 / 128 = 3
    selected = unpack(blocks.bits, 32)
    assert (selected.sum(axis=(1, 3)) == 3).all()
    for b, n in np.ndindex(2, 16):
        order = np.lexsort((np.arange(96), -probs[b, :, n].ravel()))
        assert set(np.nonzero(selected[b, :, n].ravel())[0]) == set(order[:3])


@pytest.mark.parametrize("num_columns", [1, 6, 13])
def test_budgets_beyond_the_group_take_all(num_columns, isa):
    for keywords in (masks(3, 5, 8), masks(3, 5, 8, causal=True), {}):
        blocks = check(probabilities(3, 2, 5, num_columns), top_k=64, **keywords)
        expected = np.broadcast_to(blocks.visible[:, None, :, None] > 0, (3, 2, 5, num_columns))
        np.testing.assert_array_equal(unpack(blocks.bits, num_columns), expected)


def test_one_key_and_dead_columns(isa):
    probs = probabilities(1, 2, 1, 8)
    assert unpack(check(probs, top_k=1).bits, 8).all()  # the budget 2 * 1 * 8 / 1 is the whole group
    live = unpack(check(probs, top_k=1, skip_dead=True).bits, 8)
    assert (np.nonzero(live[0, 0, 0])[0] == [3]).all()  # column ceil(K / 2) - 1


# Edges


def test_nan_is_ranked_last(isa):
    probs = probabilities(2, 3, 16, 32)
    probs[np.random.default_rng(0).random(probs.shape) < 0.5] = np.nan
    blocks = check(probs, top_k=16, num_keys=64)
    taken = unpack(blocks.bits, 32)
    assert taken.sum() == 2 * 16 * 24 and not np.isnan(probs[taken]).all()
    probs[:, :, 4] = np.nan
    check(probs, top_k=4, num_keys=64)
    assert unpack(check(probs, top_k=4, num_keys=64).bits, 32)[:, 0, 4, :6].all()


def test_masked_rows_and_strides(isa):
    keywords = masks(3, 9, 9)
    probs = probabilities(3, 2, 9, 12)
    blocks = check(probs, top_k=3, **keywords)
    dirty = np.where(keywords["query_mask"][:, None, :, None], probs, np.float32(np.nan))
    np.testing.assert_array_equal(check(dirty, top_k=3, **keywords).bits, blocks.bits)
    np.testing.assert_array_equal(check(strided(probs), top_k=3, **keywords).bits, blocks.bits)
    assert not unpack(blocks.bits, 12)[~np.broadcast_to(keywords["query_mask"][:, None], (3, 2, 9))].any()
    assert (blocks.visible[2] == 0).all() and not blocks.bits[2].any()


def test_an_item_alone_is_an_item_in_a_padded_batch(isa):
    keywords, probs = masks(3, 9, 9), probabilities(3, 2, 9, 12)
    mask = keywords["key_mask"][1]
    whole = check(probs, top_k=3, key_mask=keywords["key_mask"], query_mask=keywords["key_mask"])
    alone = check(np.ascontiguousarray(probs[1:2][:, :, mask]), top_k=3)
    np.testing.assert_array_equal(whole.bits[1][:, mask], alone.bits[0])


def test_empty_axes_and_wrong_arguments(isa):
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)):
        for group in GROUPS:
            check(np.ones(shape, np.float32), group=group)
    check(np.ones((2, 2, 3, 4), np.float32), num_keys=0)
    probs = probabilities(1, 2, 3, 4)
    wrong = [("top_k", dict(top_k=0.5)), ("top_k", dict(top_k=float("nan"))), ("group", dict(group="rows")),
             ("budget", dict(budget="both")), ("block_cap", dict(block_cap=0)),
             ("num_keys", dict(num_keys=2**31)), ("num_keys", dict(num_keys=-1)),
             (r"\w+", dict(group="head", is_causal=True)), (r"\w+", dict(group="batch", is_causal=True)),
             (r"\w+", dict(group="head", is_causal=np.True_))]  # fmt: skip
    for name, keywords in wrong:
        with pytest.raises(ValueError, match=rf"^\[select_blocks\] {name}: expected"):
            subquad.select_blocks(probs, **keywords)
    with pytest.raises(ValueError, match=r"^\[select_blocks\] probs: expected"):
        subquad.select_blocks(probs[..., :0])
