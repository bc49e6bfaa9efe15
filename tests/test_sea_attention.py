"""SEA's attention against its reference: selection, sparse part, context and mix; and its limits and laws."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, Case, as_dtype, strided
from ref import sea_attention as ref
from ref.block_pool import block_pool
from ref.patterns import unpack
from ref.running_mean import running_mean
from ref.select_blocks import select_blocks
from sparse_cases import CAUSAL_GROUPS, GROUPS, masks, probabilities

CASES = [
    Case("plain"),
    Case("tails", heads=3, seq_q=37, seq_k=51, dim=33, dim_v=17),
    Case("one_token", seq_q=1, seq_k=1),
    Case("masked", batch=3, heads=3, seq_q=21, seq_k=30, masked=True),
    Case("causal", heads=3, seq_q=37, seq_k=37, causal=True),
    Case("causal_masked", batch=3, heads=2, seq_q=31, seq_k=47, causal=True, masked=True),
    Case("causal_blind_rows", seq_q=40, seq_k=23, causal=True),
    Case("longer", batch=1, heads=12, seq_q=257, seq_k=257, dim=8, dim_v=8, causal=True),
]
BY_NAME = {case.name: case for case in CASES}
OPTIONS = ["sparse", "mixed", "given", "given_one", "capped"]
PAIRS = [(case, options) for case in CASES for options in OPTIONS if case.name != "longer" or options == "mixed"]


def inputs(case, options="mixed", dtype="float32"):
    """q, k, v, probs and keywords; masked tokens hold NaN in all of them."""
    rng, shape = np.random.default_rng(0), (case.batch, case.heads)
    q, k = rng.standard_normal((*shape, case.seq_q, case.dim)), rng.standard_normal((*shape, case.seq_k, case.dim))
    v = rng.standard_normal((*shape, case.seq_k, case.dim_v))
    longer = case.name == "longer"
    probs = probabilities(*shape, case.seq_q, 64 if longer else 12)
    keywords = masks(case.batch, case.seq_q, case.seq_k, case.masked, case.causal) | dict(top_k=16 if longer else 5)
    keywords["row_scale"] = rng.random((*shape, case.seq_q)).astype(np.float32)
    if options != "sparse":
        keywords["mix"] = rng.random((*shape, case.seq_q)).astype(np.float32)
    if options.startswith("given"):
        rows = 1 if options == "given_one" else case.seq_q
        keywords["context"] = as_dtype(rng.standard_normal((*shape, rows, case.dim_v)), dtype)
    if options == "capped":
        keywords |= dict(block_cap=2, budget="paper", scale=0.3, group="query")
    if case.masked:
        for x, mask in ((q, "query_mask"), (k, "key_mask"), (v, "key_mask"), (probs, "query_mask")):
            x[np.broadcast_to(~keywords[mask][:, None], x.shape[:3])] = np.nan
        for name in {"row_scale", "mix"} & set(keywords):
            keywords[name][np.broadcast_to(~keywords["query_mask"][:, None], q.shape[:3])] = np.nan
    return tuple(as_dtype(x, dtype) for x in (q, k, v)) + (probs,), keywords


def cotangents(case, dtype="float32"):
    rng, shape = np.random.default_rng(1), (case.batch, case.heads, case.seq_q)
    return as_dtype(rng.standard_normal((*shape, case.dim_v)), dtype), rng.standard_normal(shape).astype(np.float32)


@lru_cache
def expected(case, options, dtype="float32"):
    given, keywords = inputs(case, options, dtype)
    return Expected(ref.sea_attention, given, keywords | dict(return_lse=True), draws=1 if case.name == "longer" else 4)


@lru_cache
def expected_bwd(case, options, dtype="float32", with_lse=True):
    given, keywords = inputs(case, options, dtype)
    dout, dlse = cotangents(case, dtype)
    keywords |= dict(dlse=dlse) if with_lse else {}
    return Expected(ref.sea_attention_bwd, (dout, *given), keywords, draws=1 if case.name == "longer" else 4)


def equal_patterns(got, exact):
    for name in ("bits", "visible", "positions", "K", "block_cap", "num_keys"):
        np.testing.assert_array_equal(getattr(got, name), getattr(exact, name), err_msg=name)


# Matches the reference


@pytest.mark.parametrize("case, options", PAIRS, ids=str)
def test_matches_the_reference(case, options, isa):
    given, keywords = inputs(case, options)
    *got, pattern = subquad.sea_attention(*given, return_lse=True, return_pattern=True, **keywords)
    expected(case, options).check(tuple(got), f"{case} {options}")
    names = ("top_k", "group", "key_mask", "query_mask", "is_causal", "budget", "block_cap")
    selection = {name: keywords[name] for name in names if name in keywords}
    equal_patterns(pattern, select_blocks(given[3], num_keys=case.seq_k, **selection))
    np.testing.assert_array_equal(subquad.sea_attention(*given, **keywords), got[0])


@pytest.mark.parametrize("case, options", PAIRS, ids=str)
def test_backward_matches_the_reference(case, options, isa):
    given, keywords = inputs(case, options)
    dout, dlse = cotangents(case)
    got = subquad.sea_attention_bwd(dout, *given, dlse=dlse, **keywords)
    # context rows of one are sums over N of terms of order 1; the pool's gradient is one over M and E
    expected_bwd(case, options).check(got, f"{case} {options}", floors=2.0**-23 * case.seq_q)


@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, isa):
    for name in ["masked", "causal_masked"][: 2 if group in CAUSAL_GROUPS else 1]:
        given, keywords = inputs(BY_NAME[name])
        keywords["group"] = group
        Expected(ref.sea_attention, given, keywords).check(subquad.sea_attention(*given, **keywords), group)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    for name, options in (("masked", "mixed"), ("causal_masked", "given"), ("causal_masked", "mixed")):
        case = BY_NAME[name]
        given, keywords = inputs(case, options, dtype)
        got = within(framework, subquad.sea_attention, given, keywords | dict(return_lse=True))
        expected(case, options, dtype).check(got, f"{name} {options}", (dtype, "float32"))
        dout, dlse = cotangents(case, dtype)
        got = within(framework, subquad.sea_attention_bwd, (dout, *given), keywords | dict(dlse=dlse))
        dtypes = [dtype] * 3 + ["float32"] * 3 + [dtype] * (options == "given")
        expected_bwd(case, options, dtype).check(got, f"{name} {options}", dtypes, 2.0**-23 * case.seq_q)


# Limits


@pytest.mark.parametrize("name", ["plain", "tails", "masked", "causal", "causal_masked", "causal_blind_rows"])
def test_more_than_all_keys_is_exact_attention(name, isa):
    (q, k, v, probs), keywords = inputs(BY_NAME[name], "sparse")
    seen = {x: keywords[x] for x in ("key_mask", "is_causal") if x in keywords}
    query_mask = keywords.get("query_mask")
    out, lse = subquad.sea_attention(q, k, v, probs, top_k=51, query_mask=query_mask, return_lse=True, **seen)
    exact, exact_lse = subquad.softmax_attention(np.nan_to_num(q), k, v, return_lse=True, **seen)
    if query_mask is not None:
        exact = np.where(query_mask[:, None, :, None], exact, 0)
        exact_lse = np.where(query_mask[:, None], exact_lse, -np.inf)
    np.testing.assert_allclose(out, exact, atol=3e-6)
    np.testing.assert_allclose(lse, exact_lse, rtol=3e-6, atol=3e-6)


def test_rows_of_weights_sum_to_their_scale(isa):
    for name in ("masked", "causal_masked"):
        (q, k, v, probs), keywords = inputs(BY_NAME[name], "sparse")
        out, lse = subquad.sea_attention(q, k, np.ones_like(v), probs, return_lse=True, **keywords)
        scale = np.where(np.isneginf(lse), 0, np.nan_to_num(keywords["row_scale"]))
        np.testing.assert_allclose(out, scale[..., None] * np.ones_like(out), rtol=2e-6)


def test_a_closed_mix_is_the_context(isa):
    for name in ("masked", "causal_masked"):
        (q, k, v, probs), keywords = inputs(BY_NAME[name])
        keywords["mix"] = np.zeros_like(keywords["mix"])
        keys, queries = keywords["key_mask"], keywords["query_mask"]
        if keywords["is_causal"]:
            context = running_mean(v, num_queries=q.shape[2], key_mask=keys)
        else:
            context = block_pool(v, probs, key_mask=keys, query_mask=queries)
        expected = np.where(queries[:, None, :, None], context, 0)
        np.testing.assert_allclose(subquad.sea_attention(q, k, v, probs, **keywords), expected, rtol=1e-5, atol=2e-6)


def test_a_head_without_columns_has_the_context_alone(isa):
    given, keywords = inputs(BY_NAME["causal"], "given")
    q, k, v, probs = given
    probs[:, 1] *= 1e-3
    keywords["top_k"] = 1
    out, lse, pattern = subquad.sea_attention(*given, return_lse=True, return_pattern=True, **keywords)
    empty = ~unpack(pattern.bits, 12).any(axis=-1)
    assert empty[:, 1, 12:].all() and np.isneginf(lse[empty]).all()
    rest = (1 - keywords["mix"])[..., None] * keywords["context"]
    np.testing.assert_allclose(out[empty], rest[empty], rtol=1e-6)
    dq, *_ = subquad.sea_attention_bwd(out, *given, **keywords)
    assert (dq[empty] == 0).all()


# Laws


@pytest.mark.parametrize("name", ["causal", "causal_masked"])
def test_later_tokens_change_no_bit(name, isa):
    given, keywords = inputs(BY_NAME[name])
    cut = BY_NAME[name].seq_q - 9
    out, lse, pattern = subquad.sea_attention(*given, return_lse=True, return_pattern=True, **keywords)
    for value in (np.nan, np.inf, 1e30):
        later = [x.copy() for x in given]
        for x in later:
            x[:, :, -9:] = value
        again = subquad.sea_attention(*later, return_lse=True, return_pattern=True, **keywords)
        np.testing.assert_array_equal(again[0][:, :, :cut], out[:, :, :cut])
        np.testing.assert_array_equal(again[1][:, :, :cut], lse[:, :, :cut])
        np.testing.assert_array_equal(again[2].bits[:, :, :cut], pattern.bits[:, :, :cut])


@pytest.mark.parametrize("count", [1, 5])
def test_the_last_queries_alone_are_those_of_a_whole_pass(count, isa):
    (q, k, v, probs), keywords = inputs(BY_NAME["causal_masked"])
    whole, pattern = subquad.sea_attention(q, k, v, probs, return_pattern=True, **keywords)
    rows = {name: np.ascontiguousarray(keywords[name][..., -count:]) for name in ("row_scale", "mix", "query_mask")}
    part = [np.ascontiguousarray(x[:, :, -count:]) for x in (q, probs)]
    out, last = subquad.sea_attention(part[0], k, v, part[1], return_pattern=True, **(keywords | rows))
    np.testing.assert_allclose(out, whole[:, :, -count:], atol=2e-6)
    np.testing.assert_array_equal(last.bits, pattern.bits[:, :, -count:])
    np.testing.assert_array_equal(last.visible, pattern.visible[:, -count:])


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_an_item_alone_is_an_item_in_a_padded_batch(name, isa):
    """Left padding and holes: of queries and keys alike, so that causal rows see the same keys."""
    case = Case("square", batch=3, heads=2, seq_q=29, seq_k=29, causal=BY_NAME[name].causal)
    given, keywords = inputs(case)
    mask = masks(3, 29, 29)["key_mask"]
    padded = [np.where(mask[:, None, :, None], x, np.float32(np.nan)) for x in given]
    whole = subquad.sea_attention(*padded, key_mask=mask, query_mask=mask, **keywords)
    for b in range(3):
        alone = [np.ascontiguousarray(x[b : b + 1][:, :, mask[b]]) for x in given]
        rows = {x: np.ascontiguousarray(keywords[x][b : b + 1][:, :, mask[b]]) for x in ("row_scale", "mix")}
        out = subquad.sea_attention(*alone, **(keywords | rows))
        np.testing.assert_allclose(whole[b][:, mask[b]], out[0], atol=2e-6)
        assert (whole[b][:, ~mask[b]] == 0).all()


def test_heads_turn_with_their_estimates(isa):
    """Without ties between heads their order does not matter."""
    given, keywords = inputs(BY_NAME["causal"])
    order = [2, 0, 1]
    turned = {name: keywords[name][:, order] for name in ("row_scale", "mix")}
    out = subquad.sea_attention(*(np.ascontiguousarray(x[:, order]) for x in given), **(keywords | turned))
    np.testing.assert_array_equal(out, subquad.sea_attention(*given, **keywords)[:, order])


# Edges


def test_nan_in_the_estimate_and_no_keys(isa):
    (q, k, v, probs), keywords = inputs(BY_NAME["plain"], "sparse")
    probs[:, :, 3] = np.nan
    out = subquad.sea_attention(q, k, v, probs, **keywords)
    assert np.isfinite(out).all()
    (q, k, v, probs), keywords = inputs(BY_NAME["masked"])
    keywords["key_mask"] = np.zeros_like(keywords["key_mask"])
    out, lse = subquad.sea_attention(q, np.nan * k, np.inf * v, probs, return_lse=True, **keywords)
    assert (out == 0).all() and np.isneginf(lse).all()
    gradients = subquad.sea_attention_bwd(out + 1, q, np.nan * k, np.inf * v, probs, **keywords)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_axes(shape, causal, isa):
    batch, heads, seq_q, seq_k = shape
    q, k = np.ones((batch, heads, seq_q, 5), np.float32), np.ones((batch, heads, seq_k, 5), np.float32)
    probs, mix = np.ones((batch, heads, seq_q, 6), np.float32), np.ones((batch, heads, seq_q), np.float32) / 2
    out = subquad.sea_attention(q, k, k, probs, mix=mix, is_causal=causal)
    assert out.shape == q.shape and np.isfinite(out).all() and (seq_k or (out == 0).all())
    gradients = subquad.sea_attention_bwd(q, q, k, k, probs, mix=mix, is_causal=causal)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape, probs.shape, mix.shape]
    assert all(np.isfinite(x).all() for x in gradients)


def test_strides_and_out(isa):
    for name in ("masked", "causal_masked"):
        given, keywords = inputs(BY_NAME[name])
        out = subquad.sea_attention(*given, **keywords)
        target = strided(np.zeros_like(out))
        assert subquad.sea_attention(*(strided(x) for x in given), out=target, **keywords) is target
        np.testing.assert_array_equal(target, out)


def test_wrong_arguments(isa):
    (q, k, v, probs), _ = inputs(BY_NAME["plain"], "sparse")
    wrong = [dict(top_k=0.5), dict(group="row"), dict(budget="none"), dict(block_cap=0), dict(context=v)]
    wrong += [dict(group=group, is_causal=causal) for group in ("head", "batch") for causal in (True, np.True_)]
    for keywords in wrong:
        with pytest.raises(ValueError, match=r"^\[sea_attention\] \w+: expected"):
            subquad.sea_attention(q, k, v, probs, **keywords)
    given, mix = (q, q, q, q, probs[:, :, : q.shape[2]]), np.ones(q.shape[:3], np.float32)
    for a, b in zip(*(subquad.sea_attention_bwd(*given, mix=mix, is_causal=c) for c in (True, np.True_)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"^\[sea_attention\] \w+: expected"):
        subquad.sea_attention(q, k[:, :1].copy(), v[:, :1].copy(), probs)
