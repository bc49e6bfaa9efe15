"""EVA against its reference, attention over augmented keys; its draws, states and laws."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within, without_queries
from cases import CASES as SHORT
from cases import DTYPES, Case, arrays, as_dtype, strided
from ref import eva_attention as ref
from ref.softmax_attention import log_softmax_sum, softmax_attention
from tolerance import sum_floor

CASES = [*SHORT, Case("longer_causal", 1, 2, 1, 200, 230, 16, 24, causal=True, masked=True)]
BY_NAME = {case.name: case for case in CASES}
DEFAULTS = dict(landmarks=None, noise=None, partition=True, chunk_mass=True, scale=None, key_mask=None, is_causal=False)
FORMS = {
    "default": dict(window=8, chunk_size=8),
    "long_window": dict(window=12, chunk_size=4),
    "long_chunk": dict(window=4, chunk_size=12),
    "published": dict(window=10, chunk_size=5, partition=False, chunk_mass=False, sampled=True),
    "given": dict(window=8, chunk_size=4, given=True, sampled=True),
    "one_key": dict(window=1, chunk_size=1),
}


def inputs(case, form="default", dtype="float32"):
    q, k, v, keywords = without_queries(*arrays(case, dtype=dtype))
    rng = np.random.default_rng(3)
    keywords |= FORMS[form] | dict(scale=0.5 / case.dim**0.5)
    shape = (case.batch, case.heads_kv, -(-case.seq_k // keywords["chunk_size"]), case.dim)
    if keywords.pop("given", False):
        keywords["landmarks"] = tuple(rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    if keywords.pop("sampled", False):
        keywords["noise"] = rng.standard_normal(shape).astype(np.float32)
    return q, k, v, keywords


def cotangent(case, dtype="float32"):
    return as_dtype(np.random.default_rng(1).standard_normal((case.batch, case.heads, case.seq_q, case.dim_v)), dtype)


@lru_cache
def expected(case, form, dtype="float32"):
    *given, keywords = inputs(case, form, dtype)
    return Expected(ref.eva_attention, given, keywords, draws=8)


@lru_cache
def expected_bwd(case, form, dtype="float32"):
    *given, keywords = inputs(case, form, dtype)
    return Expected(ref.eva_attention_bwd, (cotangent(case, dtype), *given), keywords, draws=8)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matches_the_reference(case, form, isa):
    *given, keywords = inputs(case, form)
    floor = 2 * sum_floor(np.abs(given[2][np.isfinite(given[2])]).max())  # two averages, of values and of averages
    expected(case, form).check(subquad.eva_attention(*given, **keywords), f"{form} {case}", floors=floor)


@pytest.mark.parametrize("name", ["plain", "tails", "one_key", "dims_of_one", "masked", "masked_grouped", "causal",
                                  "causal_decode", "causal_masked_grouped", "longer_causal"])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_backward_matches_the_reference(name, form, isa):
    case = BY_NAME[name]
    *given, keywords = inputs(case, form)
    got = subquad.eva_attention_bwd(cotangent(case), *given, **keywords)
    expected_bwd(case, form).check(got, f"{form} {case}")


def test_any_window_and_chunk_without_partition(isa):
    q, k, v, keywords = inputs(BY_NAME["masked"], "published")
    keywords |= dict(window=7, chunk_size=5, noise=np.ones((2, 2, 7, 16), np.float32))
    Expected(ref.eva_attention, (q, k, v), keywords).check(subquad.eva_attention(q, k, v, **keywords))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["default", "given"])
@pytest.mark.parametrize("name", ["masked_grouped", "causal_masked_grouped"])
def test_every_dtype_and_framework(dtype, form, name, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    case = BY_NAME[name]
    *given, keywords = inputs(case, form, dtype)
    expected(case, form, dtype).check(within(framework, subquad.eva_attention, given, keywords), form, dtype)
    got = within(framework, subquad.eva_attention_bwd, (cotangent(case, dtype), *given), keywords)
    expected_bwd(case, form, dtype).check(got, form, (dtype, dtype, dtype, "float32", "float32")[: len(got)])


@pytest.mark.parametrize("name", ["grouped", "causal"])
def test_a_seed_stands_for_its_noise(name, isa):
    case = BY_NAME[name]
    q, k, v, keywords = inputs(case)
    chunks = -(-case.seq_k // 8)
    noise = subquad.random_normal((case.heads_kv, chunks, case.dim), seed=11, stream=7)
    noise = np.broadcast_to(noise[None], (2, *noise.shape))
    out = subquad.eva_attention(q, k, v, seed=11, **keywords)
    np.testing.assert_array_equal(subquad.eva_attention(q, k, v, noise=noise, **keywords), out)
    a = subquad.eva_attention_bwd(cotangent(case), q, k, v, seed=11, **keywords)
    b = subquad.eva_attention_bwd(cotangent(case), q, k, v, noise=noise, **keywords)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(subquad.eva_attention(q[1:], k[1:], v[1:], seed=11, **keywords), out[1:])
    assert not np.array_equal(subquad.eva_attention(q, k, v, **keywords), out)


@pytest.mark.parametrize("name", ["masked_grouped", "causal_masked_grouped"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_results_and_masked_keys(name, form, isa):
    case = BY_NAME[name]
    q, k, v, keywords = inputs(case, form)
    dout = cotangent(case)
    out, lse = subquad.eva_attention(q, k, v, return_lse=True, **keywords)
    logits = ref.Eva(*(x.astype(np.float64) for x in (q, k, v)), **DEFAULTS | keywords, dtype=np.float64).logits
    np.testing.assert_allclose(lse, log_softmax_sum(logits)[1], rtol=1e-5, atol=1e-5)
    again = subquad.eva_attention_bwd(dout, q, k, v, **keywords)
    for a, b in zip(again, subquad.eva_attention_bwd(dout, q, k, v, out=out, lse=lse, **keywords), strict=True):
        np.testing.assert_array_equal(a, b)
    cleared = [np.where(keywords["key_mask"][:, None, :, None], x, np.float32(0)) for x in (k, v)]
    np.testing.assert_array_equal(subquad.eva_attention(q, *cleared, **keywords), out)
    for a, b in zip(again, subquad.eva_attention_bwd(dout, q, *cleared, **keywords), strict=True):
        np.testing.assert_array_equal(a, b)
    keywords["key_mask"] = np.zeros_like(keywords["key_mask"])
    assert (subquad.eva_attention(q, k, v, **keywords) == 0).all()
    assert all((g == 0).all() for g in subquad.eva_attention_bwd(dout, q, k, v, **keywords))


@pytest.mark.parametrize("form", ["default", "long_window", "long_chunk", "one_key"])
@pytest.mark.parametrize("masked", [False, True])
def test_prefill_then_decode_is_one_call(form, masked, isa):
    case = BY_NAME["causal"]
    q, k, v, keywords = inputs(case, form)
    if masked:
        keywords["key_mask"] = np.random.default_rng(5).random((2, 40)) < 0.7
        k, v = (np.where(keywords["key_mask"][:, None, :, None], x, np.float32(np.nan)) for x in (k, v))
    state, outs = None, []
    for tokens in (slice(0, 21), slice(21, 22), slice(22, 23), slice(23, 36), slice(36, 40)):
        cut = keywords | (dict(key_mask=keywords["key_mask"][:, tokens]) if masked else {})
        out, state = subquad.eva_attention(
            q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], state=state, return_state=True, **cut
        )
        outs.append(out)
    whole = Expected(ref.eva_attention, (q, k, v), keywords)
    whole.check(np.concatenate(outs, axis=2), form)


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_change_no_bit(form, isa):
    q, k, v, keywords = inputs(BY_NAME["causal"], form)
    out = subquad.eva_attention(q, k, v, **keywords)
    for value in (np.nan, 1e30):
        later = [np.concatenate([x[:, :, :29], np.full_like(x[:, :, 29:], value)], axis=2) for x in (q, k, v)]
        np.testing.assert_array_equal(subquad.eva_attention(*later, **keywords)[:, :, :29], out[:, :, :29])


@pytest.mark.parametrize("name", ["masked", "causal_masked_grouped", "causal_blind_rows"])
def test_exact_where_nothing_is_approximated(name, isa):
    """A block that holds all keys, and chunks of one key."""
    case = BY_NAME[name]
    q, k, v, keywords = inputs(case)
    shared = {name: keywords[name] for name in ("key_mask", "is_causal", "scale") if name in keywords}
    exact = softmax_attention(q, k, v, **shared)
    np.testing.assert_allclose(subquad.eva_attention(q, k, v, chunk_size=1, window=4, **shared), exact, atol=5e-6)
    if case.seq_k >= case.seq_q:
        np.testing.assert_allclose(subquad.eva_attention(q, k, v, window=64, **shared), exact, atol=5e-6)


def test_strides_out_and_empty_axes(isa):
    for name in ("grouped", "causal"):
        q, k, v, keywords = inputs(BY_NAME[name], "given")
        out = subquad.eva_attention(q, k, v, **keywords)
        given = strided(np.zeros_like(out))
        assert subquad.eva_attention(strided(q), strided(k), strided(v), out=given, **keywords) is given
        np.testing.assert_array_equal(given, out)
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        batch, heads, seq_q, seq_k = shape
        x, y = np.ones((batch, heads, seq_q, 5), np.float32), np.ones((batch, heads, seq_k, 5), np.float32)
        for causal in (False, True):
            out = subquad.eva_attention(x, y, y, is_causal=causal)
            assert out.shape == x.shape and (seq_k or (out == 0).all())
            gradients = subquad.eva_attention_bwd(out, x, y, y, is_causal=causal)
            assert [g.shape for g in gradients] == [x.shape, y.shape, y.shape]
    with pytest.raises(ValueError, match=r"^\[eva_attention\] "):
        subquad.eva_attention(x, x, x, window=6, chunk_size=4)
