"""Exact softmax attention against its reference, its edges and its laws."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within, without_queries
from cases import CASES as SHORT
from cases import DTYPES, Case, arrays, as_dtype, strided
from ref import softmax_attention as ref

CASES = [*SHORT, Case("longer_causal", 1, 2, 1, 200, 230, 16, 24, causal=True, masked=True)]
BY_NAME = {case.name: case for case in CASES}
OPTIONS = ["plain", "head_bias", "item_bias", "window"]


def inputs(case, options="plain", dtype="float32"):
    q, k, v, keywords = without_queries(*arrays(case, dtype=dtype))
    rng = np.random.default_rng(3)
    if options.endswith("bias"):
        heads = {"head_bias": case.heads, "item_bias": 1, "group_bias": case.heads_kv}[options]
        bias = rng.standard_normal((case.batch, heads, case.seq_k)).astype(np.float32)
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        keywords |= dict(key_bias=bias, scale=0.3)
    if options == "window":
        keywords |= dict(window=(9, 3))
    return q, k, v, keywords


@lru_cache
def expected(case, options="plain", dtype="float32"):
    q, k, v, keywords = inputs(case, options, dtype)
    return Expected(ref.softmax_attention, (q, k, v), keywords | dict(return_lse=True))


def cotangents(case, dtype="float32"):
    rng = np.random.default_rng(1)
    dout = as_dtype(rng.standard_normal((case.batch, case.heads, case.seq_q, case.dim_v)), dtype)
    return dout, rng.standard_normal(dout.shape[:3]).astype(np.float32)


@lru_cache
def expected_bwd(case, options="plain", dtype="float32", with_lse=True):
    q, k, v, keywords = inputs(case, options, dtype)
    dout, dlse = cotangents(case, dtype)
    keywords |= dict(dlse=dlse) if with_lse else {}
    return Expected(ref.softmax_attention_bwd, (dout, q, k, v), keywords)


# Matches the reference


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_the_reference(case, options, isa):
    q, k, v, keywords = inputs(case, options)
    got = subquad.softmax_attention(q, k, v, return_lse=True, **keywords)
    expected(case, options).check(got, f"{case} {options}")
    np.testing.assert_array_equal(subquad.softmax_attention(q, k, v, **keywords), got[0])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", ["plain", "item_bias", "group_bias", "window"])
def test_backward_matches_the_reference(case, options, isa):
    q, k, v, keywords = inputs(case, options)
    dout, dlse = cotangents(case)
    got = subquad.softmax_attention_bwd(dout, q, k, v, dlse=dlse, **keywords)
    expected_bwd(case, options).check(got, f"{case} {options}")


def test_saved_results_are_those_that_are_formed_again(isa):
    for name in ("tails", "causal_masked_grouped"):
        q, k, v, keywords = inputs(BY_NAME[name])
        dout, _ = cotangents(BY_NAME[name])
        out, lse = subquad.softmax_attention(q, k, v, return_lse=True, **keywords)
        again = subquad.softmax_attention_bwd(dout, q, k, v, **keywords)
        saved = subquad.softmax_attention_bwd(dout, q, k, v, out=out, lse=lse, **keywords)
        for a, b in zip(again, saved, strict=True):
            np.testing.assert_array_equal(a, b)
        expected_bwd(BY_NAME[name], with_lse=False).check(saved, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    for name in ("causal_masked_grouped", "tails"):
        case = BY_NAME[name]
        q, k, v, keywords = inputs(case, "group_bias", dtype)
        got = within(framework, subquad.softmax_attention, (q, k, v), keywords | dict(return_lse=True))
        expected(case, "group_bias", dtype).check(got, name, (dtype, "float32"))
        dout, dlse = cotangents(case, dtype)
        got = within(framework, subquad.softmax_attention_bwd, (dout, q, k, v), keywords | dict(dlse=dlse))
        expected_bwd(case, "group_bias", dtype).check(got, name, (dtype, dtype, dtype, "float32"))


# Edges


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_axes(shape, isa):
    batch, heads, seq_q, seq_k = shape
    q, k = np.ones((batch, heads, seq_q, 5), np.float32), np.ones((batch, heads, seq_k, 5), np.float32)
    if heads == 0:
        k = np.ones((batch, 1, seq_k, 5), np.float32)
    out, lse = subquad.softmax_attention(q, k, k, return_lse=True)
    assert out.shape == q.shape and (out == (0 if seq_k == 0 else 1)).all()
    assert np.isneginf(lse).all() if seq_k == 0 else np.isfinite(lse).all()
    for gradient in subquad.softmax_attention_bwd(q, q, k, k):
        assert np.isfinite(gradient).all() and (seq_k or (gradient == 0).all())


def test_strides_and_out(isa):
    case = BY_NAME["grouped"]
    q, k, v, keywords = inputs(case, "head_bias")
    out = subquad.softmax_attention(q, k, v, **keywords)
    np.testing.assert_array_equal(subquad.softmax_attention(strided(q), strided(k), strided(v), **keywords), out)
    given = strided(np.zeros_like(out))
    assert subquad.softmax_attention(q, k, v, out=given, **keywords) is given
    np.testing.assert_array_equal(given, out)
    dout, _ = cotangents(case)
    plain = subquad.softmax_attention_bwd(dout, q, k, v, **keywords)
    views = subquad.softmax_attention_bwd(strided(dout), strided(q), strided(k), strided(v), **keywords)
    for a, b in zip(plain, views, strict=True):
        np.testing.assert_array_equal(a, b)
    broadcast = np.broadcast_to(k[:1], k.shape), np.broadcast_to(v[:1], v.shape)
    copied = [np.ascontiguousarray(x) for x in broadcast]
    np.testing.assert_array_equal(subquad.softmax_attention(q, *broadcast), subquad.softmax_attention(q, *copied))


def test_huge_logits_and_blind_rows(isa):
    q, k, v, _ = inputs(BY_NAME["tails"])
    out, lse = subquad.softmax_attention(3e3 * q, 3e3 * k, v, return_lse=True)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    assert all(np.isfinite(x).all() for x in subquad.softmax_attention_bwd(out, 3e3 * q, 3e3 * k, v))
    mask = np.zeros((2, 51), bool)
    out, lse = subquad.softmax_attention(q, np.full_like(k, np.nan), np.inf * v, key_mask=mask, return_lse=True)
    assert (out == 0).all() and np.isneginf(lse).all()
    gradients = subquad.softmax_attention_bwd(out + 1, q, np.full_like(k, np.nan), np.inf * v, key_mask=mask)
    assert all((gradient == 0).all() for gradient in gradients)


# Laws


def test_later_tokens_and_other_items_change_no_bit(isa):
    case = BY_NAME["causal_decode"]
    q, k, v, keywords = inputs(case)
    out, lse = subquad.softmax_attention(q, k, v, return_lse=True, **keywords)
    for value in (np.nan, np.inf, 1e30):
        later = [x.copy() for x in (q, k, v)]
        later[1][:, :, -2:], later[2][:, :, -2:], later[0][:, :, -2:] = value, value, value
        again = subquad.softmax_attention(*later, return_lse=True, **keywords)
        np.testing.assert_array_equal(again[0][:, :, :-2], out[:, :, :-2])
        np.testing.assert_array_equal(again[1][:, :, :-2], lse[:, :, :-2])
    np.testing.assert_array_equal(subquad.softmax_attention(q[1:], k[1:], v[1:], **keywords), out[1:])
    np.testing.assert_array_equal(subquad.softmax_attention(q[:, 1:], k[:, 1:], v[:, 1:], **keywords), out[:, 1:])


def test_windows_are_masks(isa):
    q, k, v, _ = inputs(BY_NAME["causal"])
    np.testing.assert_allclose(
        subquad.softmax_attention(q, k, v, window=(-1, 0)),
        subquad.softmax_attention(q, k, v, is_causal=True),
        atol=1e-6,
    )
    alone = subquad.softmax_attention(q, k, v, window=(0, 0))
    np.testing.assert_allclose(alone, v, atol=1e-6)
    causal = subquad.softmax_attention(q, k, v, window=(4, 7), is_causal=True)
    np.testing.assert_allclose(causal, subquad.softmax_attention(q, k, v, window=(4, 0)), atol=1e-6)


def test_a_constant_value_is_reproduced(isa):
    q, k, v, keywords = inputs(BY_NAME["causal_masked_grouped"])
    v = np.where(np.isfinite(v), np.float32(3), v)
    out, lse = subquad.softmax_attention(q, k, v, return_lse=True, **keywords)
    np.testing.assert_allclose(out, np.where(np.isneginf(lse), 0, 3)[..., None] * np.ones_like(out), rtol=1e-6)
