"""Samples of randomized attention at given keys, and their two gradients."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import sampled_proposals as ref

SHAPES = [(2, 4, 2, 3, 20, 16, 16), (1, 1, 1, 1, 1, 1, 1), (1, 6, 2, 2, 37, 19, 33), (1, 2, 1, 1, 5, 70, 200)]


def given(shape, dtype="float32", batch_noise=None):
    batch, heads, heads_kv, samples, seq_q, seq_k, dim = shape
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((batch, heads, seq_q, dim)), rng.standard_normal((batch, heads_kv, seq_k, dim))
    indices = rng.integers(-1, seq_k, (batch, heads, samples, seq_q)).astype(np.int32)
    noise = rng.standard_normal((batch_noise or batch, heads, samples, seq_q, dim)).astype(np.float32)
    dw = rng.standard_normal((batch, heads, samples, seq_q, dim)).astype(np.float32)
    score = rng.standard_normal(indices.shape).astype(np.float32)
    return as_dtype(q, dtype), as_dtype(k, dtype), indices, noise, dw, score


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, isa):
    q, k, indices, noise, dw, score = given(shape)
    got = subquad.sampled_proposals(q, k, indices, noise, noise_std=0.3)
    Expected(ref.sampled_proposals, (q, k, indices, noise), dict(noise_std=0.3)).check(got)
    assert (got[indices < 0] == 0).all()
    views = subquad.sampled_proposals(strided(q), strided(k), indices, noise, noise_std=0.3)
    np.testing.assert_array_equal(views, got)
    for more in ({}, dict(score=score, scale=0.4)):
        got = subquad.sampled_proposals_bwd(dw, q, k, indices, **more)
        Expected(ref.sampled_proposals_bwd, (dw, q, k, indices), more).check(got, f"gradients {list(more)}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    q, k, indices, noise, dw, score = given(SHAPES[0], dtype, batch_noise=1)
    got = within(framework, subquad.sampled_proposals, (q, k, indices, noise), {})
    Expected(ref.sampled_proposals, (q, k, indices, noise)).check(got, dtype)
    got = within(framework, subquad.sampled_proposals_bwd, (dw, q, k, indices), dict(score=score))
    Expected(ref.sampled_proposals_bwd, (dw, q, k, indices), dict(score=score)).check(got, dtype, dtype)


def test_a_row_of_nan_stays_where_it_is(isa):
    q, k, indices, noise, dw, _ = given(SHAPES[0])
    k[0, 0, 3] = q[1, 1, 2] = np.nan
    noise[indices < 0] = np.nan
    w = subquad.sampled_proposals(q, k, indices, noise)
    bad = np.zeros(indices.shape, bool)
    bad[0, :2] = indices[0, :2] == 3
    bad[1, 1, :, 2] = indices[1, 1, :, 2] >= 0
    np.testing.assert_array_equal(np.isnan(w).any(-1), bad)
    assert all(np.isfinite(g).all() for g in subquad.sampled_proposals_bwd(np.where(indices[..., None] < 0, np.nan, dw),
                                                                            q, k, indices))  # fmt: skip


def test_wrong_indices_and_empty_axes(isa):
    q, k, indices, noise, _, _ = given(SHAPES[0])
    for bad in (-2, 16):
        wrong = indices.copy()
        wrong[1, 2, 1, 7] = bad
        with pytest.raises(ValueError, match=r"^\[sampled_proposals\] indices: expected"):
            subquad.sampled_proposals(q, k, wrong, noise)
    none = np.full((2, 4, 1, 20), -1, np.int32)
    w = subquad.sampled_proposals(q, k[:, :, :0], none, noise[:, :, :1])
    assert (w == 0).all()
    dq, dk = subquad.sampled_proposals_bwd(w + 1, q, k[:, :, :0], none)
    assert (dq == 0).all() and dk.shape == (2, 2, 0, 16)
