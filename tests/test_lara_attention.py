"""LARA against its reference as a ratio of sums, and its limits and laws."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import CASES, DTYPES, Case, arrays, as_dtype, strided
from ref import lara_attention as ref
from ref.softmax_attention import softmax_attention as exact_attention
from tolerance import sum_floor

BY_NAME = {case.name: case for case in CASES}
SOME = [c for c in CASES if not c.causal] + [Case("longer_masked", seq_q=150, seq_k=90, masked=True, heads=4)]
OPTIONS = {
    "default": {},
    "bh": dict(mis="bh", num_landmarks=7),
    "biased": dict(mis="biased", num_landmarks=7),
    "independent": dict(t_norm="landmark", alpha_coeff=2.0, num_landmarks=7),
    "noisy": dict(num_landmarks=5, noise=3, noise_std="exact"),
    "published": dict(num_landmarks=5, noise=2, noise_std="published", mis="biased"),
    "given": dict(landmarks=6),
    "given_noisy": dict(landmarks=6, noise=2, mis="bh", scale=0.4),
}


def inputs(case, options, dtype="float32"):
    """q, k, v of moderate norms, and keywords: `noise` and `landmarks` as numbers become arrays."""
    q, k, v, masks = arrays(case, dtype="float32")
    q, k, v = (as_dtype(np.asarray(x, np.float32) * s, dtype) for x, s in ((q, 0.6), (k, 0.6), (v, 1)))
    keywords = OPTIONS[options] | {name: x for name, x in masks.items() if name != "is_causal"}
    rng = np.random.default_rng(5)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    count = min(keywords.get("num_landmarks", 49), case.seq_q, case.seq_k)
    if "landmarks" in keywords:
        count = keywords["landmarks"]
        keywords["landmarks"] = (
            draw(case.batch, case.heads, count, case.dim),
            draw(case.batch, case.heads_kv, count, case.dim),
        )
    if "noise" in keywords:
        keywords["noise"] = draw(case.batch, case.heads, count * keywords["noise"], case.dim)
    return q, k, v, keywords


def cotangent(case, dtype="float32"):
    shape = case.batch, case.heads, case.seq_q, case.dim_v
    return as_dtype(np.random.default_rng(1).standard_normal(shape), dtype)


@lru_cache
def expected(case, options, backward=False, dtype="float32"):
    q, k, v, keywords = inputs(case, options, dtype)
    if backward:
        return Expected(ref.lara_attention_bwd, (cotangent(case, dtype), q, k, v), keywords, draws=8)
    return Expected(ref.lara_attention, (q, k, v), keywords, draws=5)


def order_of_sums(v):
    """What two sums of weights of sum 1 may cost: with few samples the plain formula happens to be exact."""
    return 2 * sum_floor(np.abs(v[np.isfinite(v)]))


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_the_reference(case, options, isa):
    q, k, v, keywords = inputs(case, options)
    got = subquad.lara_attention(q, k, v, **keywords)
    expected(case, options).check(got, f"{case} {options}", floors=order_of_sums(v))


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_backward_matches_the_reference(case, options, isa):
    q, k, v, keywords = inputs(case, options)
    got = subquad.lara_attention_bwd(cotangent(case), q, k, v, **keywords)
    dout, values = np.abs(cotangent(case)), np.abs(v[np.isfinite(v)])
    # dv is a sum over queries of weights below 1; dq and dk come from products <dout, v>, times s and rows of order 1
    dv_floor, floor = sum_floor(dout.sum(2)), sum_floor(dout.sum(3)) * values.max() * case.dim**-0.5
    expected(case, options, True).check(
        got, f"{case} {options}", floors=[floor, floor, dv_floor, floor, floor][: len(got)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    for name, options in (("masked_grouped", "default"), ("tails", "given_noisy")):
        case = BY_NAME[name]
        q, k, v, keywords = inputs(case, options, dtype)
        got = within(framework, subquad.lara_attention, (q, k, v), keywords)
        expected(case, options, dtype=dtype).check(got, name, dtype)
        got = within(framework, subquad.lara_attention_bwd, (cotangent(case, dtype), q, k, v), keywords)
        dtypes = (dtype, dtype, dtype, "float32", "float32")[: len(got)]
        expected(case, options, True, dtype).check(got, name, dtypes)


def test_saved_results_are_those_that_are_formed_again(isa):
    q, k, v, keywords = inputs(BY_NAME["masked_grouped"], "default")
    out, lse = subquad.lara_attention(q, k, v, return_lse=True, **keywords)
    again = subquad.lara_attention_bwd(out, q, k, v, **keywords)
    saved = subquad.lara_attention_bwd(out, q, k, v, out=out, lse=lse, **keywords)
    for a, b in zip(again, saved, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_drawn_noise_is_the_documented_one(isa):
    q, k, v, _ = inputs(BY_NAME["grouped"], "default")
    noise = subquad.random_normal((1, 6, 4 * 8, 16), seed=3, stream=7)
    common = dict(num_landmarks=8)
    drawn = subquad.lara_attention(q, k, v, samples_per_landmark=4, seed=3, **common)
    given = subquad.lara_attention(q, k, v, noise=np.repeat(noise, 2, 0), **common)
    np.testing.assert_array_equal(drawn, given)
    half = subquad.random_normal((1, 6, 2 * 8, 16), seed=3, stream=7)
    both = np.repeat(np.concatenate([half, -half], 2), 2, 0)
    drawn = subquad.lara_attention(q, k, v, samples_per_landmark=4, antithetic=True, seed=3, **common)
    np.testing.assert_array_equal(drawn, subquad.lara_attention(q, k, v, noise=both, **common))


# Limits


@pytest.mark.parametrize("mis", ["opt", "bh", "biased"])
def test_landmarks_at_zero_are_rfa(mis, isa):
    """T5: proposals at the origin with the rows of W as noise are RFA with that W, for every rule."""
    q, k, v, _ = inputs(BY_NAME["grouped"], "default")
    rows = np.random.default_rng(0).standard_normal((2, 12, 16)).astype(np.float32)
    rfa = subquad.rfa_attention(q, k, v, projection=rows)
    zero = np.zeros((2, 6, 1, 16), np.float32), np.zeros((2, 2, 1, 16), np.float32)
    noise = np.broadcast_to(np.repeat(rows, 3, 0), (2, 6, 12, 16))
    # with one landmark t is constant over the landmarks, so that it has no part in alpha
    lara = subquad.lara_attention(q, k, v, landmarks=zero, noise=noise, mis=mis)
    np.testing.assert_allclose(lara, rfa, rtol=1e-4, atol=2e-5)


def test_one_landmark_gives_every_query_the_same(isa):
    """T6: the output is that of RFA with that single row."""
    q, k, v, _ = inputs(BY_NAME["plain"], "default")
    out = subquad.lara_attention(q, k, v, num_landmarks=1)
    np.testing.assert_allclose(out, np.broadcast_to(out[:, :, :1], out.shape), rtol=1e-5, atol=1e-6)
    row = (q.mean(2, keepdims=True) + k.mean(2, keepdims=True)) * 16**-0.25
    for b in range(2):
        rfa = subquad.rfa_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], projection=np.ascontiguousarray(row[b]))
        np.testing.assert_allclose(out[b : b + 1], rfa, rtol=1e-4, atol=1e-5)


@pytest.mark.statistical
@pytest.mark.parametrize("mis", ["opt", "bh"])
def test_errors_fall_with_more_samples_but_not_those_of_published_noise(mis):
    """T7: exact noise converges as R^-1/2; the published noise and the biased rule keep an error."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((1, 1, 10, 4)).astype(np.float32) for _ in range(3))
    exact = exact_attention(*(x.astype(np.float64) for x in (q, k, v)))

    def error(samples, **keywords):
        found = [
            np.linalg.norm(
                subquad.lara_attention(q, k, v, num_landmarks=3, samples_per_landmark=samples, seed=s, **keywords)
                - exact
            )
            for s in range(6)
        ]
        return np.mean(found) / np.linalg.norm(exact)

    few, many = error(64, mis=mis), error(65536, mis=mis)
    assert many < 0.15 * few  # a thirty-second by theory; the tails of the weights are long
    assert error(65536, mis=mis, noise_std="published") > 3 * many
    assert error(65536, mis="biased") > 2 * many


# Laws


@pytest.mark.parametrize("options", ["default", "bh", "biased", "given_noisy"])
def test_invariances(options, isa):
    """T8, T9: affine in v, in the convex hull of v, blind to the order of keys and of proposals."""
    q, k, v, keywords = inputs(BY_NAME["grouped"], options)
    out = subquad.lara_attention(q, k, v, **keywords)
    np.testing.assert_allclose(subquad.lara_attention(q, k, 3 * v + 1, **keywords), 3 * out + 1, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(subquad.lara_attention(q, k, 0 * v + 2, **keywords), 2, rtol=1e-5)
    lowest, highest = (np.repeat(f(v, 2)[:, :, None], 3, 1) for f in (np.amin, np.amax))
    assert (out <= highest + 1e-5).all() and (out >= lowest - 1e-5).all()
    if "landmarks" in keywords:
        order = np.random.default_rng(0).permutation(k.shape[2])
        np.testing.assert_allclose(
            subquad.lara_attention(q, k[:, :, order], v[:, :, order], **keywords), out, rtol=1e-4, atol=1e-5
        )
        q_bar, k_bar = keywords["landmarks"]
        turned = np.array([3, 0, 5, 1, 4, 2])
        noise = np.concatenate([keywords["noise"][:, :, turned], keywords["noise"][:, :, 6 + turned]], 2)
        moved = keywords | dict(landmarks=(q_bar[:, :, turned], k_bar[:, :, turned]), noise=noise)
        np.testing.assert_allclose(subquad.lara_attention(q, k, v, **moved), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", ["default", "bh", "biased", "independent"])
def test_padding_changes_nothing(options, isa):
    """T11, queries and keys padded with NaN, alone and together."""
    q, k, v, keywords = inputs(BY_NAME["tails"], options)
    out = subquad.lara_attention(q, k, v, **keywords)
    rng = np.random.default_rng(0)
    at_k = np.sort(rng.permutation(70)[:51])
    at_q = np.sort(rng.permutation(60)[:37])

    def spread(x, places, length):
        wide = np.full((*x.shape[:2], length, x.shape[3]), np.nan, np.float32)
        wide[:, :, places] = x
        return wide

    keep_k, keep_q = np.zeros((2, 70), bool), np.zeros((2, 60), bool)
    keep_k[:, at_k], keep_q[:, at_q] = True, True
    padded = subquad.lara_attention(
        spread(q, at_q, 60), spread(k, at_k, 70), spread(v, at_k, 70), key_mask=keep_k, query_mask=keep_q, **keywords
    )
    np.testing.assert_allclose(padded[:, :, at_q], out, rtol=1e-4, atol=1e-5)
    assert (np.delete(padded, at_q, 2) == 0).all()
    gradients = subquad.lara_attention_bwd(
        np.ones_like(padded), spread(q, at_q, 60), spread(k, at_k, 70), spread(v, at_k, 70), key_mask=keep_k,
        query_mask=keep_q, **keywords,
    )  # fmt: skip
    plain = subquad.lara_attention_bwd(np.ones_like(out), q, k, v, **keywords)
    for a, b, places in zip(gradients, plain, (at_q, at_k, at_k), strict=True):
        np.testing.assert_allclose(a[:, :, places], b, rtol=1e-3, atol=2e-4)
        assert (np.delete(a, places, 2) == 0).all()


def test_rows_are_independent_with_t_over_landmarks(isa):
    q, k, v, keywords = inputs(BY_NAME["tails"], "independent")
    landmarks = (q[:, :, :7].copy(), k[:, :, :7].copy())
    keywords = dict(t_norm="landmark", landmarks=landmarks)
    out = subquad.lara_attention(q, k, v, **keywords)
    np.testing.assert_array_equal(subquad.lara_attention(q[:, :, 8:20], k, v, **keywords), out[:, :, 8:20])


def test_large_norms_are_finite(isa):
    q, k, v, _ = inputs(BY_NAME["tails"], "default")
    for mis in ("opt", "bh", "biased"):
        out = subquad.lara_attention(20 * q, 20 * k, v, mis=mis, num_landmarks=9)
        assert np.isfinite(out).all()
        gradients = subquad.lara_attention_bwd(out, 20 * q, 20 * k, v, mis=mis, num_landmarks=9)
        assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 1, 1)], ids=str)
def test_empty_and_single(shape, isa):
    batch, heads, seq_q, seq_k = shape
    q, k = np.ones((batch, heads, seq_q, 5), np.float32), np.ones((batch, heads, seq_k, 5), np.float32)
    out = subquad.lara_attention(q, k, k)
    np.testing.assert_allclose(out, 0 if seq_k == 0 else 1, rtol=1e-6)
    for gradient in subquad.lara_attention_bwd(q, q, k, k):
        assert np.isfinite(gradient).all()
    mask = np.zeros((batch, seq_k), bool)
    assert (subquad.lara_attention(q, np.full_like(k, np.nan), k, key_mask=mask) == 0).all()


def test_strides_and_out(isa):
    q, k, v, keywords = inputs(BY_NAME["grouped"], "given")
    out = subquad.lara_attention(q, k, v, **keywords)
    views = keywords | dict(landmarks=tuple(strided(x) for x in keywords["landmarks"]))
    np.testing.assert_array_equal(subquad.lara_attention(strided(q), strided(k), strided(v), **views), out)
    given = strided(np.zeros_like(out))
    assert subquad.lara_attention(q, k, v, out=given, **keywords) is given
    np.testing.assert_array_equal(given, out)


PAIR = (np.zeros((2, 2, 3, 16), "f4"), np.zeros((2, 2, 3, 16), "f4"))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(num_landmarks=0), ValueError, "num_landmarks: expected a value in [1,"),
        (dict(num_landmarks=4, landmarks=PAIR), ValueError, "num_landmarks: expected 3 as in landmarks, got 4"),
        (dict(landmarks=(PAIR[0],)), TypeError, "landmarks: expected None or a pair (q_bar, k_bar), got 1 values"),
        (dict(landmarks=(PAIR[0], PAIR[1][:, :, :2])), ValueError, "landmarks k_bar: expected shape"),
        (
            dict(landmarks=PAIR, noise=np.zeros((2, 2, 4, 16), "f4")),
            ValueError,
            "noise: expected J a multiple of the 3",
        ),
        (dict(samples_per_landmark=2), ValueError, "samples_per_landmark: expected 1 without a seed or noise, got 2"),
        (dict(antithetic=True), ValueError, "antithetic: expected False without a seed"),
        (dict(antithetic=True, seed=1, samples_per_landmark=3), ValueError, "samples_per_landmark: expected an even"),
        (
            dict(antithetic=True, landmarks=PAIR, noise=np.zeros((2, 2, 6, 16), "f4")),
            ValueError,
            "antithetic: expected",
        ),
        (dict(mis="best"), ValueError, 'mis: expected "opt" or "bh" or "biased"'),
        (dict(t_norm="both"), ValueError, 't_norm: expected "query" or "landmark"'),
        (dict(alpha_coeff=np.nan), ValueError, "alpha_coeff: expected a finite number"),
        (dict(noise_std=-2.0), ValueError, "noise_std: expected"),
        (dict(query_mask=np.ones((2, 19), bool)), ValueError, "query_mask: expected shape [B, N] = [2, 20]"),
        (dict(is_causal=True), TypeError, "is_causal"),
    ],
)
def test_bad_inputs(keywords, error, message):
    q, k, v, _ = inputs(BY_NAME["plain"], "default")
    with pytest.raises(error) as caught:
        subquad.lara_attention(q, k, v, **keywords)
    assert message in str(caught.value) and "\n" not in str(caught.value)
