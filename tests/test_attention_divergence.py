"""Divergences between a student's and a teacher's attention against their reference."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import CASES, DTYPES, Case, arrays, as_dtype, strided
from ref import attention_divergence as ref
from tolerance import sum_floor

CASES = [*CASES, Case("longer_causal", 1, 2, 1, 200, 230, 16, 24, causal=True, masked=True)]
BY_NAME = {case.name: case for case in CASES}


def inputs(case, dtype="float32"):
    """Student and teacher; the teacher has dim_v as its head dim, and one key head a query head in some cases."""
    q, k, _, keywords = arrays(case, dtype=dtype)
    heads_kv = case.heads if case.dim_v % 2 else case.heads_kv
    teacher = Case("teacher", case.batch, case.heads, heads_kv, case.seq_q, case.seq_k, case.dim_v, 1)
    qt, kt, _, _ = arrays(teacher, seed=1, dtype=dtype)
    if case.masked:
        kt[np.broadcast_to(~keywords["key_mask"][:, None], kt.shape[:3])] = np.nan
        qt[np.broadcast_to(~keywords["query_mask"][:, None], qt.shape[:3])] = np.nan
    return (q, k, qt, kt), keywords


def cotangents(case):
    rng = np.random.default_rng(2)
    return tuple(rng.standard_normal((case.batch, case.heads, case.seq_q)).astype(np.float32) for _ in range(2))


@lru_cache
def expected(case, dtype="float32"):
    given, keywords = inputs(case, dtype)
    return Expected(ref.attention_divergence, given, keywords, draws=4)


@lru_cache
def expected_bwd(case, dtype="float32"):
    given, keywords = inputs(case, dtype)
    # many draws where they are cheap: the rounding of a large logit of either side moves whole rows
    draws = 24 if case.seq_k < 100 else 5
    return Expected(ref.attention_divergence_bwd, (*cotangents(case), *given), keywords, draws=draws)


def logit_floor(case, given, keywords):
    """kl is a sum of differences of logits: where student and teacher nearly agree, their rounding is what is left."""
    q, k, qt, kt = (np.abs(np.nan_to_num(np.asarray(x, np.float64))) for x in given)
    return sum_floor([q.max() * k.max() * q.shape[-1] ** 0.5, qt.max() * kt.max() * qt.shape[-1] ** 0.5])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, isa):
    given, keywords = inputs(case)
    got = subquad.attention_divergence(*given, **keywords)
    expected(case).check(got, str(case), floors=[logit_floor(case, given, keywords), 1e-7])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_matches_the_reference(case, isa):
    given, keywords = inputs(case)
    got = subquad.attention_divergence_bwd(*cotangents(case), *given, **keywords)
    expected_bwd(case).check(got, str(case))


def test_options(isa):
    case = BY_NAME["grouped"]
    given, keywords = inputs(case)
    keywords |= dict(scale=0.3, scale_teacher=0.2)
    Expected(ref.attention_divergence, given, keywords).check(subquad.attention_divergence(*given, **keywords))
    for parts in ((cotangents(case)[0], None), (None, cotangents(case)[1])):
        got = subquad.attention_divergence_bwd(*parts, *given, **keywords)
        Expected(ref.attention_divergence_bwd, (*parts, *given), keywords).check(got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    case = BY_NAME["causal_masked_grouped"]
    given, keywords = inputs(case, dtype)
    got = within(framework, subquad.attention_divergence, given, keywords)
    expected(case, dtype).check(got, dtype, floors=[logit_floor(case, given, keywords), 1e-7])
    got = within(framework, subquad.attention_divergence_bwd, (*cotangents(case), *given), keywords)
    expected_bwd(case, dtype).check(got, dtype, dtype)


# Laws


def test_a_student_like_its_teacher_diverges_by_nothing(isa):
    (q, k, _, _), keywords = inputs(BY_NAME["causal_masked_grouped"])
    kl, sse = subquad.attention_divergence(q, k, q, k, **keywords)
    assert np.abs(kl).max() <= 1e-6 and (sse <= 1e-12).all()
    for gradient in subquad.attention_divergence_bwd(kl + 1, sse + 1, q, k, q, k, **keywords):
        assert np.abs(gradient).max() <= 1e-5


def test_later_keys_and_other_items_change_no_bit(isa):
    given, keywords = inputs(BY_NAME["causal_decode"])
    got = subquad.attention_divergence(*given, **keywords)
    cotangent = cotangents(BY_NAME["causal_decode"])
    dq, _ = subquad.attention_divergence_bwd(*cotangent, *given, **keywords)
    for value in (np.nan, np.inf, 1e30):
        later = [x.copy() for x in given]
        for x in later:
            x[:, :, -2:] = value
        for a, b in zip(subquad.attention_divergence(*later, **keywords), got, strict=True):
            np.testing.assert_array_equal(a[:, :, :-2], b[:, :, :-2])
        again, _ = subquad.attention_divergence_bwd(*cotangent, *later, **keywords)
        np.testing.assert_array_equal(again[:, :, :-2], dq[:, :, :-2])
    for a, b in zip(subquad.attention_divergence(*(x[1:] for x in given), **keywords), got, strict=True):
        np.testing.assert_array_equal(a, b[1:])


def test_huge_logits_and_rows_without_keys(isa):
    given, _ = inputs(BY_NAME["tails"])
    for size in (3.0, 1e3):
        huge = [size * x for x in given]
        kl, sse = subquad.attention_divergence(*huge)
        assert np.isfinite(kl).all() and np.isfinite(sse).all() and (kl >= -1e-5 * np.abs(kl).max()).all()
        assert all(np.isfinite(x).all() for x in subquad.attention_divergence_bwd(kl, sse, *huge))
    none = dict(key_mask=np.zeros((2, 51), bool))
    q, k, qt, kt = given
    blind = q, np.nan * k, qt, np.inf * kt
    kl, sse = subquad.attention_divergence(*blind, **none)
    assert (kl == 0).all() and (sse == 0).all()
    assert all((x == 0).all() for x in subquad.attention_divergence_bwd(kl + 1, sse + 1, *blind, **none))


def test_empty_axes_and_strides(isa):
    for batch, heads, seq_q, seq_k in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        q, k = (as_dtype(np.ones((batch, max(heads, i), n, 5)), "float32") for i, n in enumerate((seq_q, seq_k)))
        kl, sse = subquad.attention_divergence(q, k, q, k)
        assert kl.shape == sse.shape == q.shape[:3] and (kl == 0).all()
        assert [x.shape for x in subquad.attention_divergence_bwd(kl, sse, q, k, q, k)] == [q.shape, k.shape]
    given, _ = inputs(BY_NAME["grouped"])
    plain = (
        subquad.attention_divergence(*given),
        subquad.attention_divergence_bwd(*cotangents(BY_NAME["grouped"]), *given),
    )
    views = [strided(x) for x in given]
    again = (
        subquad.attention_divergence(*views),
        subquad.attention_divergence_bwd(*cotangents(BY_NAME["grouped"]), *views),
    )
    for a, b in zip([*plain[0], *plain[1]], [*again[0], *again[1]], strict=True):
        np.testing.assert_array_equal(a, b)
