"""SEA's estimator against its reference; decoding, padding and causality."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import sea_estimate as ref
from sparse_cases import masks, sea_weights

# batch, heads, tokens, head dim, features, columns
SIZES = [(2, 2, 20, 8, 11, 8), (1, 1, 1, 1, 1, 4), (3, 3, 37, 16, 33, 12), (1, 2, 2, 9, 20, 16), (1, 2, 71, 32, 40, 64)]
NAMES = ("s", "z", "rows1", "rows2", "count")


def inputs(size, causal, masked=False, dtype="float32"):
    batch, heads, seq, dim, features, columns = size
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((batch, heads, seq, dim)) for _ in range(3))
    keywords = dict(is_causal=causal, weights=sea_weights(heads, dim, features, columns, causal, table=seq + 5))
    if masked:
        keywords["key_mask"] = masks(batch, seq, seq)["key_mask"]
        for x in (q, k, v):
            x[np.broadcast_to(~keywords["key_mask"][:, None], x.shape[:3])] = np.nan
    return tuple(as_dtype(x, dtype) for x in (q, k, v)), keywords


@lru_cache
def expected(size, causal, masked=False, dtype="float32"):
    given, keywords = inputs(size, causal, masked, dtype)
    return Expected(ref.sea_estimate, given, keywords, draws=12)


def check_state(got, exact, rtol=1e-5):
    for name, a, b in zip(NAMES, got, exact, strict=True):
        assert a.dtype == (np.int32 if name == "count" else np.float32), name
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (1 + np.abs(b).max(initial=0)), err_msg=name)


# Matches the reference


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(size, causal, masked, isa):
    given, keywords = inputs(size, causal, masked)
    got = subquad.sea_estimate(*given, **keywords)
    expected(size, causal, masked).check(got, str(size))
    kept = np.broadcast_to(keywords.get("key_mask", np.ones((size[0], size[2]), bool))[:, None], got[1].shape)
    np.testing.assert_allclose(got[0].sum(axis=-1), kept, atol=2e-6)
    assert all((x[~kept] == 0).all() for x in got)
    for a, b in zip(subquad.sea_estimate(*(strided(x) for x in given), **keywords), got, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_every_dtype_and_framework(dtype, causal, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    given, keywords = inputs(SIZES[2], causal, True, dtype)
    weights = {name: framework.make(x) for name, x in keywords.pop("weights").items()}
    call = lambda *xs, **more: subquad.sea_estimate(*xs, weights, **more)  # noqa: E731
    expected(SIZES[2], causal, True, dtype).check(within(framework, call, given, keywords), dtype)


# Decoding


@pytest.mark.parametrize("masked", [False, True])
def test_the_state_of_one_pass(masked, isa):
    given, keywords = inputs(SIZES[2], True, masked)
    *_, state = subquad.sea_estimate(*given, return_state=True, **keywords)
    check_state(state, ref.sea_estimate(*given, return_state=True, **keywords)[3])


@pytest.mark.parametrize("cuts", [range(1, 37), (5, 6, 20), (4, 8, 8, 33), (0, 37)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_are_one_pass(cuts, masked, isa):
    given, keywords = inputs(SIZES[2], True, masked)
    mask, state, parts, edges = keywords.pop("key_mask", None), None, [], [0, *cuts, 37]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = [np.ascontiguousarray(x[:, :, low:high]) for x in given]
        cut = None if mask is None else np.ascontiguousarray(mask[:, low:high])
        *results, state = subquad.sea_estimate(*part, key_mask=cut, state=state, return_state=True, **keywords)
        parts.append(results)
    got = tuple(np.concatenate(several, axis=2) for several in zip(*parts, strict=True))
    expected(SIZES[2], True, masked).check(got, str(cuts))
    check_state(state, ref.sea_estimate(*given, key_mask=mask, return_state=True, **keywords)[3])


# Laws


def test_later_tokens_and_other_items_change_no_bit(isa):
    given, keywords = inputs(SIZES[2], True)
    got = subquad.sea_estimate(*given, **keywords)
    for value in (np.nan, np.inf, 1e30, 3.0):
        later = [x.copy() for x in given]
        for x in later:
            x[:, :, 22:] = value
        for a, b in zip(subquad.sea_estimate(*later, **keywords), got, strict=True):
            np.testing.assert_array_equal(a[:, :, :22], b[:, :, :22])
    for causal in (False, True):
        given, keywords = inputs(SIZES[2], causal)
        whole = subquad.sea_estimate(*given, **keywords)
        for a, b in zip(subquad.sea_estimate(*(x[1:] for x in given), **keywords), whole, strict=True):
            np.testing.assert_array_equal(a, b[1:])


@pytest.mark.parametrize("causal", [False, True])
def test_an_item_alone_is_an_item_in_a_padded_batch(causal, isa):
    given, keywords = inputs(SIZES[2], causal, True)
    mask = keywords.pop("key_mask")
    got = subquad.sea_estimate(*given, key_mask=mask, **keywords)
    for b in range(3):
        alone = [np.ascontiguousarray(x[b : b + 1][:, :, mask[b]]) for x in given]
        for whole, item in zip(got, subquad.sea_estimate(*alone, **keywords), strict=True):
            np.testing.assert_allclose(whole[b][:, mask[b]], item[0], rtol=1e-5, atol=1e-6)
            assert (whole[b][:, ~mask[b]] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_heads_turn_with_their_channels(causal, isa):
    given, keywords = inputs(SIZES[2], causal)
    weights, order, splits = dict(keywords["weights"]), np.array([2, 0, 1]), 2 if causal else 4
    channels = (order[:, None] * splits + np.arange(splits)).ravel()
    for name in ("conv1", "conv2"):
        weights[name + "_weight"] = np.ascontiguousarray(weights[name + "_weight"][channels][:, channels])
        weights[name + "_bias"] = weights[name + "_bias"][channels]
    weights["out_weight"] = np.ascontiguousarray(weights["out_weight"][order][:, channels])
    weights["out_bias"] = weights["out_bias"][order]
    turned = [np.ascontiguousarray(x[:, order]) for x in given]
    got = subquad.sea_estimate(*turned, weights, is_causal=causal)
    for a, b in zip(got, subquad.sea_estimate(*given, **keywords), strict=True):
        np.testing.assert_allclose(a, b[:, order], rtol=1e-5, atol=1e-6)


def test_large_norms_stay_finite(isa):
    """The exponentials of the features are stabilised; features have a floor, so that no denominator is 0."""
    for causal in (False, True):
        given, keywords = inputs(SIZES[2], causal)
        for size in (0.0, 30.0, 1e3):
            for x in subquad.sea_estimate(*(np.float32(size) * x for x in given), **keywords):
                assert np.isfinite(x).all()


# Edges


@pytest.mark.parametrize("causal", [False, True])
def test_nothing(causal, isa):
    for batch, heads, seq in ((0, 2, 5), (2, 2, 0)):
        given, keywords = inputs((batch, heads, seq, 8, 5, 8), causal)
        probs, row_scale, mix = subquad.sea_estimate(*given, **keywords)
        assert probs.shape == (batch, heads, seq, 8) and row_scale.shape == mix.shape == (batch, heads, seq)
    given, keywords = inputs(SIZES[0], causal)
    none = subquad.sea_estimate(*(np.nan * x for x in given), key_mask=np.zeros((2, 20), bool), **keywords)
    assert all((x == 0).all() for x in none)


def test_a_pass_without_tokens_hands_the_state_on(isa):
    given, keywords = inputs(SIZES[0], True)
    *_, state = subquad.sea_estimate(*given, return_state=True, **keywords)
    empty = [np.ascontiguousarray(x[:, :, :0]) for x in given]
    *_, same = subquad.sea_estimate(*empty, state=state, return_state=True, **keywords)
    for a, b in zip(same, state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_wrong_arguments(isa):
    given, keywords = inputs(SIZES[0], True)
    weights = keywords["weights"]
    short = weights | dict(position=weights["position"][:19])
    odd = weights | dict(norm_weight=weights["norm_weight"][:7], norm_bias=weights["norm_bias"][:7])
    missing = {name: x for name, x in weights.items() if name != "conv1_bias"}
    featureless = weights | dict(projection=weights["projection"][:0])
    for wrong in (short, odd, missing, featureless, weights | dict(extra=weights["out_bias"])):
        with pytest.raises(ValueError, match=r"^\[sea_estimate\] [\w ]+: expected"):
            subquad.sea_estimate(*given, wrong, is_causal=True)
    *_, state = subquad.sea_estimate(*given, return_state=True, **keywords)
    with pytest.raises(ValueError, match=r"^\[sea_estimate\] [\w ]+: expected"):  # 20 tokens more than 25 rows
        subquad.sea_estimate(*given, state=state, **keywords)
    with pytest.raises((TypeError, ValueError), match=r"^\[sea_estimate\] [\w ]+: expected"):
        subquad.sea_estimate(*given, inputs(SIZES[0], False)[1]["weights"], state=state)
