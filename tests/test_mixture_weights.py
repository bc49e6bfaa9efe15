"""The optimal weights of LARA against their reference, and their gradient."""

import math

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import mixture_weights as ref

SHAPES = [(2, 4, 20, 7, 14, 16), (1, 1, 1, 1, 1, 1), (1, 3, 37, 17, 17, 33), (1, 1, 5, 49, 98, 64)]  # B, H, N, C, J, D


def given(shape, over_queries=True, masked=False, dtype="float32"):
    """Weights well away from the floor of 1e-8, and some that are clearly below it."""
    batch, heads, seq, count, samples, dim = shape
    rng = np.random.default_rng(0)
    q, q_bar = rng.standard_normal((batch, heads, seq, dim)), rng.standard_normal((batch, heads, count, dim))
    balance = rng.uniform(1.5, 2.5, (batch, heads, samples)).astype(np.float32)
    balance[:, :, 2::5] = -3
    keywords = dict(alpha_coeff=0.8, scale=0.9 * dim**-0.5)
    if masked:
        mask = rng.random((batch, seq)) < 0.7
        counts = rng.integers(0, 3, (batch, count)).astype(np.int32)
        q[np.broadcast_to(~mask[:, None], q.shape[:3])] = np.nan
        q_bar[np.broadcast_to(counts[:, None] == 0, q_bar.shape[:3])] = np.nan
        keywords |= dict(query_mask=mask, counts=counts)
    q, q_bar = as_dtype(q, dtype), as_dtype(q_bar, dtype)
    if over_queries:
        wide = [x.astype(np.float64) for x in (q, q_bar)]
        lse = ref.column_lse(*wide, scale=keywords["scale"], query_mask=keywords.get("query_mask"))
        keywords["column_lse"] = lse.astype(np.float32)
    return q, q_bar, balance, keywords


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("over_queries", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(shape, over_queries, masked, isa):
    q, q_bar, balance, keywords = given(shape, over_queries, masked)
    got = subquad.mixture_weights(q, q_bar, balance, **keywords)
    Expected(ref.mixture_weights, (q, q_bar, balance), keywords).check(got)
    assert (got == np.float32(math.log(1e-8))).any() or shape[4] < 3
    views = subquad.mixture_weights(strided(q), strided(q_bar), balance, **keywords)
    np.testing.assert_array_equal(views, got)
    dout = np.random.default_rng(1).standard_normal(got.shape).astype(np.float32)
    got = subquad.mixture_weights_bwd(dout, q, q_bar, balance, **keywords)
    Expected(ref.mixture_weights_bwd, (dout, q, q_bar, balance), keywords).check(got, "gradients")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("over_queries", [True, False])
def test_every_dtype_and_framework(dtype, over_queries, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    q, q_bar, balance, keywords = given(SHAPES[0], over_queries, True, dtype)
    got = within(framework, subquad.mixture_weights, (q, q_bar, balance), keywords)
    expected = Expected(ref.mixture_weights, (q, q_bar, balance), keywords)
    expected.check(got, dtype)
    dout = np.random.default_rng(1).standard_normal(expected.exact[0].shape).astype(np.float32)
    got = within(framework, subquad.mixture_weights_bwd, (dout, q, q_bar, balance), keywords)
    expected = Expected(ref.mixture_weights_bwd, (dout, q, q_bar, balance), keywords)
    expected.check(got, dtype, (dtype, "float32", "float32"))


def test_rows_and_samples_that_are_left_out(isa):
    for over_queries in (True, False):
        q, q_bar, balance, keywords = given(SHAPES[0], over_queries, True)
        log_alpha = subquad.mixture_weights(q, q_bar, balance, **keywords)
        missing = keywords["counts"][:, None, None, np.arange(14) % 7] == 0
        left_out = np.broadcast_to(missing | ~keywords["query_mask"][:, None, :, None], log_alpha.shape)
        np.testing.assert_array_equal(np.isneginf(log_alpha), left_out)
        dout = np.where(left_out, np.float32(np.nan), 1)
        dq, dq_bar, dbalance = subquad.mixture_weights_bwd(dout, q, q_bar, balance, **keywords)
        assert np.isfinite(dq).all() and np.isfinite(dq_bar).all() and np.isfinite(dbalance).all()
        assert (dq[np.broadcast_to(~keywords["query_mask"][:, None], dq.shape[:3])] == 0).all()
        assert (dq_bar[np.broadcast_to(keywords["counts"][:, None] == 0, dq_bar.shape[:3])] == 0).all()


def test_empty_axes(isa):
    for batch, heads, seq, count in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        q, q_bar = np.ones((batch, heads, seq, 5), np.float32), np.ones((batch, heads, count, 5), np.float32)
        balance = np.ones((batch, heads, count), np.float32)
        log_alpha = subquad.mixture_weights(q, q_bar, balance)
        assert log_alpha.shape == (batch, heads, seq, count)
        gradients = subquad.mixture_weights_bwd(log_alpha, q, q_bar, balance)
        assert [g.shape for g in gradients] == [q.shape, q_bar.shape, balance.shape]
        assert all(np.isfinite(g).all() for g in gradients)
