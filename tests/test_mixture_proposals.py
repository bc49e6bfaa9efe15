"""Samples around landmarks and their log-densities against the reference, with the gradient of all of them."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import mixture_proposals as ref

MIS = ["opt", "bh", "biased"]
SHAPES = [(2, 4, 2, 7, 16), (1, 1, 1, 1, 1), (1, 6, 2, 17, 33), (1, 1, 1, 49, 64)]  # B, H, Hkv, C, D
NOISES = [(0, False), (1, False), (3, False), (2, True)]  # samples per landmark, antithetic


def given(shape, rounds=1, antithetic=False, dtype="float32", counted=True):
    batch, heads, heads_kv, count, dim = shape
    rng = np.random.default_rng(0)
    bars = [as_dtype(rng.standard_normal((batch, h, count, dim)), dtype) for h in (heads, heads_kv)]
    noise = None
    if rounds:
        rows = rounds * count // (2 if antithetic else 1)
        noise = rng.standard_normal((1, heads, rows, dim)).astype(np.float32)
    keywords = dict(noise_std=0.7, scale=0.8 * dim**-0.5, antithetic=antithetic)
    if counted:
        counts = rng.integers(0, 4, (batch, count)).astype(np.int32)
        counts[0] = np.maximum(counts[0], 1)
        keywords["counts"] = counts
    return *bars, noise, keywords


def select_existing(results, keywords, count):
    """Landmarks that do not exist leave w and keys unspecified."""
    if "counts" not in keywords:
        return results
    exists = keywords["counts"][:, None, np.arange(results[2].shape[2]) % count, None] > 0
    w, keys, *rest = results
    return np.where(exists, w, 0), None if keys is None else np.where(exists, keys, 0), *rest


def forward(q_bar, k_bar, noise, **keywords):
    results = ref.mixture_proposals(q_bar, k_bar, noise, **keywords)
    dtype = keywords.get("dtype", np.float64)
    results = select_existing(results, keywords, q_bar.shape[2])
    return tuple(None if x is None else x.astype(dtype) for x in results)


def backward(dw, dkeys, dlog_density, dbalance, q_bar, k_bar, noise, **keywords):
    cotangents = dict(dw=dw, dkeys=dkeys, dlog_density=dlog_density, dbalance=dbalance)
    return ref.mixture_proposals_bwd(q_bar, k_bar, noise, **cotangents, **keywords)


def cotangents(results):
    rng = np.random.default_rng(1)
    return [None if x is None else rng.standard_normal(x.shape).astype(np.float32) for x in results]


def library_backward(dw, dkeys, dlog_density, dbalance, q_bar, k_bar, noise, **keywords):
    names = dict(dw=dw, dkeys=dkeys, dlog_density=dlog_density, dbalance=dbalance)
    return subquad.mixture_proposals_bwd(q_bar, k_bar, noise, **names, **keywords)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mis", MIS)
@pytest.mark.parametrize(("rounds", "antithetic"), NOISES)
def test_matches_the_reference(shape, mis, rounds, antithetic, isa):
    if antithetic and rounds * shape[3] % 2:
        shape = (*shape[:3], shape[3] + 1, shape[4])
    q_bar, k_bar, noise, keywords = given(shape, rounds, antithetic)
    keywords |= dict(mis=mis)
    got = select_existing(subquad.mixture_proposals(q_bar, k_bar, noise, **keywords), keywords, shape[3])
    expected = Expected(forward, (q_bar, k_bar, noise), keywords)
    expected.check(got, mis)
    douts = cotangents(expected.exact)
    got = library_backward(*douts, q_bar, k_bar, noise, **keywords)
    Expected(backward, (*douts, q_bar, k_bar, noise), keywords).check(got, f"gradient of {mis}")
    for i in range(4):  # each cotangent alone
        alone = [dout if j == i else None for j, dout in enumerate(douts)]
        if douts[i] is not None:
            got = library_backward(*alone, q_bar, k_bar, noise, **keywords)
            Expected(backward, (*alone, q_bar, k_bar, noise), keywords).check(got, f"gradient {i} of {mis}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mis", ["opt", "biased"])
def test_every_dtype_and_framework(dtype, mis, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    q_bar, k_bar, noise, keywords = given(SHAPES[0], 2, dtype=dtype)
    keywords |= dict(mis=mis)
    got = within(framework, subquad.mixture_proposals, (q_bar, k_bar, noise), keywords)
    expected = Expected(forward, (q_bar, k_bar, noise), keywords)
    expected.check(select_existing(got, keywords, 7), dtype)
    douts = cotangents(expected.exact)
    names = dict(zip(("dw", "dkeys", "dlog_density", "dbalance"), douts, strict=True))
    got = within(framework, subquad.mixture_proposals_bwd, (q_bar, k_bar, noise), keywords | names)
    Expected(backward, (*douts, q_bar, k_bar, noise), keywords).check(got, dtype)


@pytest.mark.parametrize("mis", MIS)
def test_landmarks_that_do_not_exist_have_no_effect(mis, isa):
    q_bar, k_bar, noise, keywords = given(SHAPES[0], 2)
    keywords |= dict(mis=mis)
    results = select_existing(subquad.mixture_proposals(q_bar, k_bar, noise, **keywords), keywords, 7)
    missing = keywords["counts"][:, None, :] == 0
    assert missing.any()
    bad = [np.where(missing[..., None], np.float32(np.nan), x) for x in (q_bar, k_bar)]
    again = select_existing(subquad.mixture_proposals(*bad, noise, **keywords), keywords, 7)
    for a, b in zip(again, results, strict=True):
        np.testing.assert_array_equal(a, b) if a is not None else None
    at = np.broadcast_to(missing[:, :, np.arange(14) % 7], (2, 4, 14))
    assert (results[2][at] == np.inf).all() and np.isfinite(results[2][~at]).all()
    douts = cotangents(results)
    gradient = library_backward(*douts, *bad, noise, **keywords)
    np.testing.assert_array_equal(gradient, library_backward(*douts, q_bar, k_bar, noise, **keywords))
    assert (gradient[np.broadcast_to(missing, (2, 4, 7))] == 0).all()


def test_strides_and_huge_landmarks(isa):
    q_bar, k_bar, noise, keywords = given(SHAPES[2], 1, counted=False)
    got = subquad.mixture_proposals(q_bar, k_bar, noise, **keywords)
    views = subquad.mixture_proposals(strided(q_bar), strided(k_bar), strided(noise), **keywords)
    for a, b in zip(got, views, strict=True):
        np.testing.assert_array_equal(a, b) if a is not None else None
    huge = subquad.mixture_proposals(100 * q_bar, 100 * k_bar, noise, mis="bh")
    assert np.isfinite(huge[2]).all()
    for count in (0, 5):
        empty = np.ones((count, 2, 5 - count, 4), np.float32)
        results = subquad.mixture_proposals(empty, empty)
        assert results[0].shape == empty.shape and results[2].shape == empty.shape[:3]
        assert subquad.mixture_proposals_bwd(empty, empty, dw=results[0]).shape == empty.shape
