"""Masses of a teacher per column against their reference."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import CASES, DTYPES, Case, arrays, as_dtype, strided
from ref import teacher_blocks as ref
from sparse_cases import masks

CASES = [*CASES, Case("longer_causal", 1, 2, 1, 200, 230, 16, 24, causal=True, masked=True)]
BY_NAME = {case.name: case for case in CASES}


def inputs(case, dtype="float32"):
    q, k, _, keywords = arrays(case, dtype=dtype)
    return q, k, keywords


@lru_cache
def expected(case, columns, dtype="float32", scale=None):
    q, k, keywords = inputs(case, dtype)
    more = keywords | dict(num_columns=columns, scale=scale)
    return Expected(ref.teacher_blocks, (q, k), more, draws=4)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("columns", [1, 8, 64])
def test_matches_the_reference(case, columns, isa):
    q, k, keywords = inputs(case)
    got = subquad.teacher_blocks(q, k, columns, **keywords)
    expected(case, columns).check(got, str(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    case = BY_NAME["causal_masked_grouped"]
    q, k, keywords = inputs(case, dtype)
    call = lambda q, k, **given: subquad.teacher_blocks(q, k, 8, scale=0.4, **given)  # noqa: E731
    expected(case, 8, dtype, 0.4).check(within(framework, call, (q, k), keywords), dtype)


# Laws


def test_masses_are_block_sums_of_the_attention(isa):
    """The rows of exact attention, got from unit values, summed over blocks."""
    case = BY_NAME["causal_masked_grouped"]
    q, k, keywords = inputs(case)
    seen = keywords.pop("query_mask")
    q = np.nan_to_num(q)
    unit = np.broadcast_to(np.eye(case.seq_k, dtype=np.float32), (*k.shape[:2], case.seq_k, case.seq_k)).copy()
    rows = subquad.softmax_attention(q, k, unit, **keywords)
    masses, squares, plogp = subquad.teacher_blocks(q, k, 8, query_mask=seen, **keywords)
    masses_of_rows = subquad.block_sum(rows, 8, query_mask=seen, **keywords)
    np.testing.assert_allclose(masses, masses_of_rows, rtol=1e-5, atol=1e-6)
    rows = np.where(seen[:, None, :, None], rows.astype(np.float64), 0)
    np.testing.assert_allclose(squares, (rows**2).sum(axis=-1), rtol=1e-5)
    logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
    np.testing.assert_allclose(plogp, (rows * logs).sum(axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masses.sum(axis=-1), rows.sum(axis=-1), atol=2e-6)


def test_equal_logits_give_widths(isa):
    q, k = np.zeros((1, 2, 5, 4), np.float32), np.ones((1, 2, 37, 4), np.float32)
    masses, squares, plogp = subquad.teacher_blocks(q, k, 8)
    widths = subquad.block_sum(np.ones((1, 2, 5, 37), np.float32), 8)
    np.testing.assert_allclose(masses, widths / 37, rtol=1e-6)
    np.testing.assert_allclose(squares, 1 / 37, rtol=1e-6)
    np.testing.assert_allclose(plogp, -np.log(37), rtol=1e-6)


def test_later_keys_and_other_items_change_no_bit(isa):
    case = BY_NAME["causal_decode"]
    q, k, keywords = inputs(case)
    got = subquad.teacher_blocks(q, k, 8, **keywords)
    for value in (np.nan, np.inf, 1e30):
        later = [q.copy(), k.copy()]
        later[0][:, :, -2:], later[1][:, :, -2:] = value, value
        for a, b in zip(subquad.teacher_blocks(*later, 8, **keywords), got, strict=True):
            np.testing.assert_array_equal(a[:, :, :-2], b[:, :, :-2])
    for a, b in zip(subquad.teacher_blocks(q[1:], k[1:], 8, **keywords), got, strict=True):
        np.testing.assert_array_equal(a, b[1:])


def test_huge_logits_and_one_key(isa):
    q, k, _ = inputs(BY_NAME["tails"])
    for size in (30.0, 3e3):
        masses, squares, plogp = subquad.teacher_blocks(size * q, size * k, 8)
        assert all(np.isfinite(x).all() for x in (masses, squares, plogp))
        np.testing.assert_allclose(masses.sum(axis=-1), 1, atol=1e-5)
    masses, squares, plogp = subquad.teacher_blocks(q, k[:, :, :1], 8)
    assert (masses[..., 3] == 1).all() and (squares == 1).all() and (plogp == 0).all()  # column ceil(K / 2) - 1


def test_nothing_and_strides(isa):
    q, k, _ = inputs(BY_NAME["grouped"])
    none = subquad.teacher_blocks(q, np.nan * k, 8, key_mask=np.zeros((2, 19), bool))
    assert all((x == 0).all() for x in none)
    views, plain = subquad.teacher_blocks(strided(q), strided(k), 8), subquad.teacher_blocks(q, k, 8)
    for a, b in zip(views, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    for batch, heads, seq_q, seq_k in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        q, k = (as_dtype(np.ones((batch, max(heads, i), n, 5)), "float32") for i, n in enumerate((seq_q, seq_k)))
        masses, squares, plogp = subquad.teacher_blocks(q, k, 6, **masks(batch, seq_q, seq_k, masked=batch > 0))
        assert masses.shape == (batch, heads, seq_q, 6) and squares.shape == plogp.shape == (batch, heads, seq_q)
