"""Random feature attention against its phi-level reference, its edges and its laws."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within, without_queries
from cases import CASES as SHORT
from cases import DTYPES, Case, arrays, as_dtype, strided
from ref import rfa_attention as ref
from ref.pairs import clear_masked
from ref.softmax_attention import softmax_attention
from test_linear_attention import order_floors as linear_floors

CASES = [*SHORT, Case("longer_causal", 1, 2, 1, 200, 230, 16, 24, causal=True, masked=True)]  # more than one chunk
BY_NAME = {case.name: case for case in CASES}
FEATURES = ["positive", "hyperbolic", "trig", "relu", "elu"]
BACKWARD = ["plain", "one_key", "tails", "dims_of_one", "masked_grouped", "causal", "causal_blind_rows",
            "causal_masked_grouped", "longer_causal"]  # fmt: skip


def inputs(case, features="positive", dtype="float32", gated=False):
    """Scales of moderate logits, and small ones for trig features, so that their denominators stay away from 0."""
    q, k, v, keywords = without_queries(*arrays(case, dtype=dtype))
    rng = np.random.default_rng(3)
    keywords |= dict(features=features)
    if features != "elu":
        keywords["scale"] = (0.05 if features == "trig" else 2.5) / case.dim
        keywords["projection"] = rng.standard_normal((case.heads_kv, 24, case.dim)).astype(np.float32)
    if gated:
        keywords["gate"] = rng.random(k.shape[:3]).astype(np.float32)
    return q, k, v, keywords


def cotangent(case, dtype="float32"):
    return as_dtype(np.random.default_rng(1).standard_normal((case.batch, case.heads, case.seq_q, case.dim_v)), dtype)


def order_floors(case, features, dtype, gated, backward):
    """What the order of sums over features and keys may cost, carried from features to q, k and projection."""
    q, k, v, keywords = inputs(case, features, dtype, gated)
    q, k = np.asarray(q, np.float64), clear_masked(k, keywords.get("key_mask"))
    fq, fk, reading = ref.feature_maps(q, k, features, keywords.get("projection"), keywords.get("scale"), np.float64)
    reading |= {name: keywords[name] for name in ("key_mask", "is_causal", "gate") if name in keywords}
    floors = linear_floors(cotangent(case, dtype) if backward else None, fq, fk, v, reading)
    if not backward:
        return floors["out"]
    root = keywords.get("scale", 1) ** 0.5
    slope = 1 if features == "elu" else root * np.abs(keywords["projection"]).max() * fq.shape[-1] ** 0.5
    size = root * max(np.abs(q).max(), np.abs(k).max())
    dk = floors["dfk"] * slope + floors["weight"] * size * root
    rows = (floors["dfq"] * size, floors["dfk"] * size) if features != "elu" else ()
    return [
        floors["dfq"] * slope,
        dk,
        floors["dv"],
        *([sum(rows)] if rows else ()),
        *([floors["rate"]] if gated else ()),
    ]


class Checked:
    def __init__(self, case, features, dtype, gated, backward):
        *given, keywords = inputs(case, features, dtype, gated)
        reference = ref.rfa_attention_bwd if backward else ref.rfa_attention
        self.expected = Expected(reference, (cotangent(case, dtype), *given) if backward else given, keywords)
        self.floors = order_floors(case, features, dtype, gated, backward)
        self.dtypes = [dtype] * 3 + ["float32"] * 2 if backward else [dtype]

    def check(self, got, what):
        self.expected.check(got, what, self.dtypes, self.floors)


@lru_cache
def expected(case, features, dtype="float32", gated=False):
    return Checked(case, features, dtype, gated, False)


@lru_cache
def expected_bwd(case, features, dtype="float32", gated=False):
    return Checked(case, features, dtype, gated, True)


# Matches the reference


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_matches_the_reference(case, features, isa):
    *given, keywords = inputs(case, features)
    expected(case, features).check(subquad.rfa_attention(*given, **keywords), f"{features} {case}")


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("features", FEATURES)
def test_backward_matches_the_reference(name, features, isa):
    case = BY_NAME[name]
    *given, keywords = inputs(case, features)
    got = subquad.rfa_attention_bwd(cotangent(case), *given, **keywords)
    expected_bwd(case, features).check(got, f"{features} {case}")


@pytest.mark.parametrize("features", FEATURES)
def test_gates(features, isa):
    case = BY_NAME["causal_masked_grouped"]
    *given, keywords = inputs(case, features, gated=True)
    expected(case, features, gated=True).check(subquad.rfa_attention(*given, **keywords), features)
    got = subquad.rfa_attention_bwd(cotangent(case), *given, **keywords)
    expected_bwd(case, features, gated=True).check(got, features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", ["positive", "trig"])
@pytest.mark.parametrize("name", ["masked_grouped", "causal_masked_grouped"])
def test_every_dtype_and_framework(dtype, features, name, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    case = BY_NAME[name]
    *given, keywords = inputs(case, features, dtype)
    got = within(framework, subquad.rfa_attention, given, keywords)
    expected(case, features, dtype).check(got, features)
    got = within(framework, subquad.rfa_attention_bwd, (cotangent(case, dtype), *given), keywords)
    expected_bwd(case, features, dtype).check(got, features)


def test_saved_results_are_those_that_are_formed_again(isa):
    case = BY_NAME["masked_grouped"]
    *given, keywords = inputs(case)
    out, lse = subquad.rfa_attention(*given, return_lse=True, **keywords)
    again = subquad.rfa_attention_bwd(cotangent(case), *given, **keywords)
    saved = subquad.rfa_attention_bwd(cotangent(case), *given, out=out, lse=lse, **keywords)
    for a, b in zip(again, saved, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
def test_lse_is_the_logarithm_of_the_denominator(features, isa):
    """Without the factor e^{-|q~|^2 / 2} and the number of features, which cancel."""
    q, k, v, keywords = inputs(BY_NAME["masked_grouped"], features)
    _, lse = subquad.rfa_attention(q, k, v, return_lse=True, **keywords)
    k = clear_masked(k, keywords["key_mask"])
    fq, fk, _ = ref.feature_maps(q, k, features, keywords["projection"], keywords["scale"], np.float64)
    weights = np.exp(fq[:, :, :, None] + np.repeat(fk, 2, axis=1)[:, :, None]).sum(axis=-1)
    total = np.where(keywords["key_mask"][:, None, None], weights, 0).sum(axis=-1)
    square = keywords["scale"] / 2 * (q.astype(np.float64) ** 2).sum(axis=-1)
    np.testing.assert_allclose(lse, np.log(total) + square, rtol=3e-6)


# Draws


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_seed_stands_for_its_projection(causal, orthogonal, isa):
    case = BY_NAME["grouped"]
    q, k, v, _ = inputs(case)
    keywords = dict(is_causal=causal, seed=11, num_features=20, orthogonal=orthogonal)
    if orthogonal:
        rows = subquad.orthogonal_projection(20, case.dim, seed=11, heads=2)
    else:
        rows = subquad.random_normal((2, 20, case.dim), seed=11, stream=4)
    out = subquad.rfa_attention(q, k, v, **keywords)
    np.testing.assert_array_equal(out, subquad.rfa_attention(q, k, v, projection=rows, is_causal=causal))
    dout = cotangent(case)
    drawn = subquad.rfa_attention_bwd(dout, q, k, v, **keywords)
    given = subquad.rfa_attention_bwd(dout, q, k, v, projection=rows, is_causal=causal)
    assert len(drawn) == 3 and len(given) == 4
    for a, b in zip(drawn, given[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(subquad.rfa_attention(q[1:], k[1:], v[1:], **keywords), out[1:])
    assert not np.array_equal(subquad.rfa_attention(q, k, v, **(keywords | dict(seed=12))), out)
    shared = subquad.rfa_attention(q, k, v, projection=rows[0], is_causal=causal)
    both = subquad.rfa_attention(q, k, v, projection=np.stack([rows[0]] * 2), is_causal=causal)
    np.testing.assert_array_equal(shared, both)


# States


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("gated", [False, True])
def test_prefill_then_decode_is_one_call(features, gated, isa):
    case = BY_NAME["causal"]
    q, k, v, keywords = inputs(case, features, gated=gated)
    state, outs = None, []
    for tokens in (slice(0, 33), *(slice(t, t + 1) for t in range(33, 37)), slice(37, 40)):
        cut = keywords | ({"gate": keywords["gate"][:, :, tokens]} if gated else {})
        out, state = subquad.rfa_attention(
            q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], state=state, return_state=True, **cut
        )
        outs.append(out)
    expected(case, features, gated=gated).check(np.concatenate(outs, axis=2), features)


# Edges and laws


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_have_no_effect(features, causal, isa):
    """Neither in a forward nor in a backward pass, whatever they hold."""
    case = BY_NAME["masked_grouped"]
    q, k, v, keywords = inputs(case, features)
    keywords["is_causal"] = causal
    cleared = [np.where(keywords["key_mask"][:, None, :, None], x, np.float32(0)) for x in (k, v)]
    np.testing.assert_array_equal(
        subquad.rfa_attention(q, k, v, **keywords), subquad.rfa_attention(q, *cleared, **keywords)
    )
    got = subquad.rfa_attention_bwd(cotangent(case), q, k, v, **keywords)
    for a, b in zip(got, subquad.rfa_attention_bwd(cotangent(case), q, *cleared, **keywords), strict=True):
        np.testing.assert_array_equal(a, b)
    for x in got[1:3]:
        assert (x[np.broadcast_to(~keywords["key_mask"][:, None], x.shape[:3])] == 0).all()
    keywords["key_mask"] = np.zeros_like(keywords["key_mask"])
    assert (subquad.rfa_attention(q, k, v, **keywords) == 0).all()
    assert all((g == 0).all() for g in subquad.rfa_attention_bwd(cotangent(case), q, k, v, **keywords))


@pytest.mark.parametrize("features", FEATURES)
def test_later_tokens_change_no_bit(features, isa):
    q, k, v, keywords = inputs(BY_NAME["causal"], features)
    out = subquad.rfa_attention(q, k, v, **keywords)
    for value in (np.nan, 40.0):
        later = [np.concatenate([x[:, :, :29], np.full_like(x[:, :, 29:], value)], axis=2) for x in (q, k, v)]
        np.testing.assert_array_equal(subquad.rfa_attention(*later, **keywords)[:, :, :29], out[:, :, :29])


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_norms_stay_in_the_hull(features, causal, isa):
    q, k, v, keywords = inputs(BY_NAME["causal"], features)
    keywords |= dict(is_causal=causal, scale=1.0)
    size = float(np.sqrt(2000 / 16))
    out = subquad.rfa_attention(size * q / 4, size * k / 4, v, **keywords)
    assert (out <= v.max(axis=2, keepdims=True) + 1e-5).all() and (out >= v.min(axis=2, keepdims=True) - 1e-5).all()
    gradients = subquad.rfa_attention_bwd(out, size * q / 4, size * k / 4, v, **keywords)
    assert all(np.isfinite(g).all() for g in gradients)


def test_strides_out_and_empty_axes(isa):
    for causal in (False, True):
        q, k, v, keywords = inputs(BY_NAME["grouped"])
        keywords["is_causal"] = causal
        out = subquad.rfa_attention(q, k, v, **keywords)
        given = strided(np.zeros_like(out))
        assert subquad.rfa_attention(strided(q), strided(k), strided(v), out=given, **keywords) is given
        np.testing.assert_array_equal(given, out)
        for shape in ((0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
            batch, heads, seq_q, seq_k = shape
            q, k = np.ones((batch, heads, seq_q, 5), np.float32), np.ones((batch, heads, seq_k, 5), np.float32)
            out = subquad.rfa_attention(q, k, k, num_features=7, is_causal=causal)
            assert out.shape == q.shape and (seq_k or (out == 0).all())
            gradients = subquad.rfa_attention_bwd(out, q, k, k, num_features=7, is_causal=causal)
            assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]


@pytest.mark.statistical
def test_many_features_approach_softmax_attention():
    """Norms of 0.8: 4096 positive features are within 4 %, 64 are not, and trig and hyperbolic ones likewise."""
    rng = np.random.default_rng(5)
    q, k, v = (0.4 * rng.standard_normal((1, 2, 30, 16)).astype(np.float32) for _ in range(3))
    exact = softmax_attention(q, k, v, scale=0.5)
    size = np.sqrt(np.mean(exact**2))
    for features in ("positive", "hyperbolic", "trig"):
        errors = []
        for count in (64, 4096):
            out = subquad.rfa_attention(q, k, v, features=features, num_features=count, scale=0.5, seed=1)
            errors.append(np.sqrt(np.mean((out - exact) ** 2)) / size)
        assert errors[1] < 0.06 and errors[1] < 0.35 * errors[0], features
