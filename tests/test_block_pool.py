"""Pooled values against their reference."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import block_pool as ref
from sparse_cases import masks, probabilities
from tolerance import sum_floor

SIZES = [(3, 2, 9, 20, 16, 8), (1, 1, 1, 1, 1, 1), (2, 3, 33, 51, 33, 7), (1, 2, 5, 4, 200, 64), (1, 1, 70, 300, 9, 96)]


def inputs(size, masked=False, dtype="float32"):
    batch, heads, seq_q, seq_k, dim, columns = size
    v = np.random.default_rng(0).standard_normal((batch, heads, seq_k, dim)) + 0.5
    probs, keywords = probabilities(batch, heads, seq_q, columns), {}
    if masked:
        keywords = masks(batch, seq_q, seq_k)
        del keywords["is_causal"]
        v[np.broadcast_to(~keywords["key_mask"][:, None], v.shape[:3])] = np.nan
        probs[np.broadcast_to(~keywords["query_mask"][:, None], probs.shape[:3])] = np.nan
    return as_dtype(v, dtype), probs, keywords


def cotangent(size, dtype="float32"):
    return as_dtype(np.random.default_rng(1).standard_normal((*size[:2], 1, size[4])), dtype)


def floors(v, probs, dout):
    """What the order of the sums may cost: over tokens (out), over queries (dv), over E and tokens (dprobs)."""
    v, probs, dout = (np.abs(np.nan_to_num(np.asarray(x, np.float64))) for x in (v, probs, dout))
    products = sum_floor(v @ dout.swapaxes(-1, -2))
    return [2 * sum_floor(probs.max(axis=(2, 3))[..., None] * v.sum(axis=2)), sum_floor(dout), products]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(size, masked, isa):
    v, probs, keywords = inputs(size, masked)
    dout = cotangent(size)
    out_floor, *gradient_floors = floors(v, probs, dout)
    out = subquad.block_pool(v, probs, **keywords)
    Expected(ref.block_pool, (v, probs), keywords).check(out, str(size), floors=out_floor)
    got = subquad.block_pool_bwd(dout, v, probs, **keywords)
    Expected(ref.block_pool_bwd, (dout, v, probs), keywords).check(got, str(size), floors=gradient_floors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    v, probs, keywords = inputs(SIZES[0], True, dtype)
    got = within(framework, subquad.block_pool, (v, probs), keywords)
    Expected(ref.block_pool, (v, probs), keywords).check(got, dtype, dtype)
    dout = cotangent(SIZES[0], dtype)
    got = within(framework, subquad.block_pool_bwd, (dout, v, probs), keywords)
    Expected(ref.block_pool_bwd, (dout, v, probs), keywords).check(got, dtype, (dtype, "float32"), [0.0, 1e-6])


def test_weights_sum_to_keys_over_columns(isa):
    """Of T = 64 tokens and K = 16 columns every probability counts 4 times: the pool is not normalised."""
    probs = probabilities(1, 2, 64, 16)
    np.testing.assert_allclose(subquad.block_pool(np.ones((1, 2, 64, 3), np.float32), probs), 4, rtol=2e-6)


def test_an_item_alone_is_an_item_in_a_padded_batch(isa):
    v, probs, keywords = inputs(SIZES[0], True)
    out = subquad.block_pool(v, probs, **keywords)
    keys, queries = keywords["key_mask"][1], keywords["query_mask"][1]
    alone = [np.ascontiguousarray(x) for x in (v[1:2][:, :, keys], probs[1:2][:, :, queries])]
    np.testing.assert_allclose(out[1:2], subquad.block_pool(*alone), rtol=1e-6, atol=1e-6)
    assert (out[2] == 0).all()  # no key


def test_nothing_is_zero(isa):
    v, probs, _ = inputs(SIZES[0])
    dout = cotangent(SIZES[0])
    for keywords in (dict(key_mask=np.zeros((3, 20), bool)), dict(query_mask=np.zeros((3, 9), bool))):
        nan = [np.nan * v, probs] if "key_mask" in keywords else [v, np.nan * probs]
        assert (subquad.block_pool(*nan, **keywords) == 0).all()
        assert all((gradient == 0).all() for gradient in subquad.block_pool_bwd(dout, *nan, **keywords))
    for batch, heads, seq_q, seq_k in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        v, probs = np.ones((batch, heads, seq_k, 5), np.float32), np.ones((batch, heads, seq_q, 6), np.float32)
        out = subquad.block_pool(v, probs)
        assert out.shape == (batch, heads, 1, 5) and (seq_q * seq_k > 0 or (out == 0).all())
        dv, dprobs = subquad.block_pool_bwd(out, v, probs)
        assert dv.shape == v.shape and dprobs.shape == probs.shape


def test_strides_and_out(isa):
    v, probs, keywords = inputs(SIZES[0], True)
    dout = cotangent(SIZES[0])
    out = subquad.block_pool(v, probs, **keywords)
    given = strided(np.zeros_like(out))
    assert subquad.block_pool(strided(v), strided(probs), out=given, **keywords) is given
    np.testing.assert_array_equal(given, out)
    plain = subquad.block_pool_bwd(dout, v, probs, **keywords)
    views = subquad.block_pool_bwd(strided(dout), strided(v), strided(probs), **keywords)
    for a, b in zip(plain, views, strict=True):
        np.testing.assert_array_equal(a, b)
