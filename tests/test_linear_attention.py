"""Linear attention against its reference: forms, gates, states, and what a later token may not change."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import CASES as SHORT
from cases import DTYPES, Case, arrays, as_dtype, strided
from ref import linear_attention as ref
from tolerance import sum_floor

CASES = [*SHORT, Case("longer_causal", 1, 2, 1, 200, 230, 16, 24, causal=True, masked=True)]  # more than one chunk
BY_NAME = {case.name: case for case in CASES}
MODES = ["linear", "plain", "log", "weighted"]
CAUSAL = [case for case in CASES if case.causal]


def inputs(case, mode="linear", rate=None, dtype="float32"):
    """Features of a case: positive ones, or logarithms as large as those of positive features."""
    q, k, v, masks = arrays(case, dtype="float32")
    fq, fk = np.abs(np.nan_to_num(q, nan=1.0)) + np.float32(0.1), np.abs(k) + np.float32(0.1)
    rng = np.random.default_rng(2)
    keywords = dict(is_causal=case.causal, normalize=mode != "plain")
    if "key_mask" in masks:
        keywords["key_mask"] = masks["key_mask"]
    if mode == "log":
        keywords["log_features"] = True
        fq, fk = 2 * fq - 9, 3 * k - 5
    if mode == "weighted":
        keywords["key_log_weight"] = (5 * rng.standard_normal(fk.shape[:3])).astype(np.float32)
    if rate:
        rates = rng.random(fk.shape[:3]).astype(np.float32)
        rates[:, :, 1::7], rates[:, :, 4::9] = 0, 1
        keywords[rate] = rates
    return as_dtype(fq, dtype), as_dtype(fk, dtype), as_dtype(np.asarray(v, np.float64), dtype), keywords


def cotangent(case, dtype="float32"):
    return as_dtype(np.random.default_rng(1).standard_normal((case.batch, case.heads, case.seq_q, case.dim_v)), dtype)


def order_floors(dout, fq, fk, v, keywords):
    """What the order of sums and the rounding of exponents may cost out, dfq, dfk, dv and the gradients of weights and
    rates: the factored form adds up terms that cancel in the ratio, and rounds the exponent of each factor."""
    keywords = dict(is_causal=False, normalize=True, log_features=False, key_log_weight=None, key_mask=None, gate=None,
                    decay=None, state=None) | keywords  # fmt: skip
    normalize = keywords.pop("normalize")
    order = "log_features key_log_weight key_mask is_causal gate decay state".split()
    wide = [np.asarray(x, np.float64) for x in (fq, fk, v)]
    p = ref.Pairs(*wide, *(keywords[name] for name in order), np.float64)
    numerator, total = p.sums()
    dout = np.ones_like(numerator) if dout is None else np.abs(np.asarray(dout, np.float64))
    den = np.where(total != 0, np.abs(total), 1) if normalize else np.ones_like(total)
    mean, weights, values = np.abs(numerator) / den * normalize, np.abs(p.key_weights), np.abs(p.v)
    old = np.abs(p.state_weights) @ np.abs(p.s)
    g = dout / den
    slopes = np.where(p.seen, g @ values.swapaxes(-1, -2) + (g * mean).sum(axis=-1, keepdims=True), 0)
    sizes = 1 + np.abs(np.where(p.seen & np.isfinite(p.free), p.free, 0))
    if p.log:
        sizes = (1 + np.abs(p.fq))[:, :, :, None] + np.where(p.seen[..., None], np.abs(p.fk)[:, :, None], 0)
        parts = (slopes * weights)[..., None] * p.mix * sizes
        dfq, dfk, sizes = parts.sum(axis=3), parts.sum(axis=2), (p.mix * sizes).sum(axis=-1)
    else:
        products = slopes * np.abs(p.units[0]) * sizes
        dfq, dfk = products @ np.abs(p.fk), products.swapaxes(-1, -2) @ np.abs(p.fq)
    group = fq.shape[1] // fk.shape[1]
    floors = {
        "out": 2 * ((weights * sizes) @ values + old) / den,
        "dfq": dfq,
        "dfk": dfk * group,
        "dv": 2 * (weights * sizes).swapaxes(-1, -2) @ g * group,
        "weight": (slopes * weights * sizes).sum(axis=2) * group,
        "rate": (slopes * np.abs(p.products) * np.exp(np.where(p.seen, p.free - p.top, -np.inf))).sum(axis=(2, 3))
        * group,
    }
    return {name: sum_floor(np.abs(x)) for name, x in floors.items()}


class Checked:
    """The reference's result for inputs, with the floors above."""

    def __init__(self, inputs, keywords, dout=None, dtype="float32"):
        self.floors = order_floors(dout, *inputs, keywords)
        if dout is None:
            self.names, self.expected = ["out"], Expected(ref.linear_attention, inputs, keywords)
        else:
            more = {"key_log_weight": "weight", "gate": "rate", "decay": "rate"}
            self.names = ["dfq", "dfk", "dv", *(more[name] for name in more if name in keywords)]
            self.expected = Expected(ref.linear_attention_bwd, (dout, *inputs), keywords)
        self.dtypes = [dtype if name[0] in "od" else "float32" for name in self.names]

    def check(self, got, what):
        self.expected.check(got, what, self.dtypes, [self.floors[name] for name in self.names])


@lru_cache
def expected(case, mode, rate=None, dtype="float32"):
    *given, keywords = inputs(case, mode, rate, dtype)
    return Checked(given, keywords, dtype=dtype)


@lru_cache
def expected_bwd(case, mode, rate=None, dtype="float32"):
    *given, keywords = inputs(case, mode, rate, dtype)
    return Checked(given, keywords, cotangent(case, dtype), dtype)


# Matches the reference


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matches_the_reference(case, mode, isa):
    fq, fk, v, keywords = inputs(case, mode)
    expected(case, mode).check(subquad.linear_attention(fq, fk, v, **keywords), f"{mode} {case}")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_backward_matches_the_reference(case, mode, isa):
    fq, fk, v, keywords = inputs(case, mode)
    got = subquad.linear_attention_bwd(cotangent(case), fq, fk, v, **keywords)
    expected_bwd(case, mode).check(got, f"{mode} {case}")


@pytest.mark.parametrize("case", CAUSAL, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", ["gate", "decay"])
def test_gates_and_decay(case, mode, rate, isa):
    fq, fk, v, keywords = inputs(case, mode, rate)
    expected(case, mode, rate).check(subquad.linear_attention(fq, fk, v, **keywords), f"{mode} {rate} {case}")
    got = subquad.linear_attention_bwd(cotangent(case), fq, fk, v, **keywords)
    expected_bwd(case, mode, rate).check(got, f"{mode} {rate} {case}")


def test_a_decay_per_head(isa):
    fq, fk, v, keywords = inputs(BY_NAME["causal"])
    decay = np.array([0.9, 0.5], np.float32)
    wide = np.broadcast_to(decay[None, :, None], fk.shape[:3])
    out = subquad.linear_attention(fq, fk, v, decay=decay, **keywords)
    np.testing.assert_array_equal(out, subquad.linear_attention(fq, fk, v, decay=wide, **keywords))
    dout = cotangent(BY_NAME["causal"])
    got = subquad.linear_attention_bwd(dout, fq, fk, v, decay=decay, **keywords)
    every = subquad.linear_attention_bwd(dout, fq, fk, v, decay=wide, **keywords)
    np.testing.assert_allclose(got[3], every[3].sum((0, 2)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["linear", "log"])
def test_every_dtype_and_framework(dtype, mode, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    case = BY_NAME["causal_masked_grouped"]
    fq, fk, v, keywords = inputs(case, mode, "gate", dtype)
    got = within(framework, subquad.linear_attention, (fq, fk, v), keywords)
    expected(case, mode, "gate", dtype).check(got, mode)
    dout = cotangent(case, dtype)
    got = within(framework, subquad.linear_attention_bwd, (dout, fq, fk, v), keywords)
    expected_bwd(case, mode, "gate", dtype).check(got, mode)


# States


def part_of(keywords, tokens):
    cut = {name: x[..., tokens] for name, x in keywords.items() if isinstance(x, np.ndarray)}
    return keywords | cut


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [None, "gate", "decay"])
def test_parts_with_a_state_are_the_whole(mode, rate, isa):
    """Prefill, an empty part, single steps, and a last part, against one call."""
    case = BY_NAME["causal_masked_grouped"]
    fq, fk, v, keywords = inputs(case, mode, rate)
    fq = np.concatenate([fq, fq[:, :, :16]], axis=2)  # a query for every key
    whole = Checked((fq, fk, v), keywords)
    state, outs = None, []
    for tokens in (slice(0, 20), slice(20, 20), *(slice(t, t + 1) for t in range(20, 24)), slice(24, 47)):
        out, state = subquad.linear_attention(
            *(x[:, :, tokens] for x in (fq, fk, v)), state=state, return_state=True, **part_of(keywords, tokens)
        )
        assert [None if x is None else x.dtype.name for x in state[:2]] == ["float32"] * 2
        outs.append(out)
    whole.check(np.concatenate(outs, axis=2), f"{mode} {rate}")
    _, (s, z, shift) = ref.linear_attention(fq, fk, v, return_state=True, **keywords)
    if shift is None:
        assert state[2] is None
        scale = 1
    else:
        scale = np.exp(np.where(np.isneginf(shift), 0, state[2] - shift))
    assert np.abs(state[1] * scale - z).max() <= 1e-5 * np.abs(z).max()
    assert np.abs(state[0] * np.asarray(scale)[..., None] - s).max() <= 1e-5 * np.abs(s).max()


@pytest.mark.parametrize("mode", MODES)
def test_backward_with_a_state(mode, isa):
    case = BY_NAME["causal_masked_grouped"]
    fq, fk, v, keywords = inputs(case, mode, "decay")
    _, state = ref.linear_attention(
        *(x[:, :, 30:] for x in (fq, fk, v)), return_state=True, **part_of(keywords, slice(30, None))
    )
    state = tuple(None if x is None else x.astype(np.float32) for x in state)
    rest = tuple(np.ascontiguousarray(x) for x in (fq[:, :, 1:31], fk[:, :, :30], v[:, :, :30]))
    keywords = part_of(keywords, slice(0, 30)) | dict(state=state)
    Checked(rest, keywords).check(subquad.linear_attention(*rest, **keywords), mode)
    dout = cotangent(case)[:, :, 1:31]
    got = subquad.linear_attention_bwd(dout, *rest, **keywords)
    Checked(rest, keywords, dout).check(got, mode)


# Edges and laws


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [None, "gate"])
def test_later_tokens_change_no_bit(mode, rate, isa):
    case = BY_NAME["causal"]
    fq, fk, v, keywords = inputs(case, mode, rate)
    out = subquad.linear_attention(fq, fk, v, **keywords)
    for value in (np.nan, np.inf, 1e30, 300.0):
        later = [x.copy() for x in (fq, fk, v)]
        more = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
        for x in later:
            x[:, :, 29:] = value
        if mode == "weighted":
            more["key_log_weight"][:, :, 29:] = value
        again = subquad.linear_attention(*later, **more)
        np.testing.assert_array_equal(again[:, :, :29], out[:, :, :29], err_msg=str(value))
    np.testing.assert_array_equal(
        subquad.linear_attention(fq[1:], fk[1:], v[1:], **{n: x[1:] if isinstance(x, np.ndarray) else x
                                                          for n, x in keywords.items()}), out[1:])  # fmt: skip


@pytest.mark.parametrize("size", [100.0, 2e4])
@pytest.mark.parametrize("causal", [False, True])
def test_logarithms_of_any_size(size, causal, isa):
    """Rows are averages of values whatever the size of the logarithms; their precision is that of the logarithms."""
    rng = np.random.default_rng(4)
    fq, fk = (size * rng.uniform(-0.5, 0.5, (1, 2, 40, 12)).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((1, 2, 40, 9)).astype(np.float32)
    keywords = dict(is_causal=causal, log_features=True)
    out = subquad.linear_attention(fq, fk, v, **keywords)
    np.testing.assert_allclose(out, ref.linear_attention(fq, fk, v, **keywords), atol=8 * size * 2.0**-23)
    assert (out <= v.max(axis=2, keepdims=True) + 1e-5).all() and (out >= v.min(axis=2, keepdims=True) - 1e-5).all()
    dout = np.ones_like(out)
    assert all(np.isfinite(g).all() for g in subquad.linear_attention_bwd(dout, fq, fk, v, **keywords))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_no_visible_key(mode, causal, isa):
    fq, fk, v, keywords = inputs(BY_NAME["masked"], mode)
    keywords |= dict(is_causal=causal, key_mask=np.zeros((2, 33), bool))
    fk, v = np.full_like(fk, np.nan), np.full_like(v, np.inf)
    out = subquad.linear_attention(fq, fk, v, **keywords)
    assert (out == 0).all()
    for gradient in subquad.linear_attention_bwd(out + 1, fq, fk, v, **keywords):
        assert (gradient == 0).all()
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        batch, heads, seq_q, seq_k = shape
        q, k = np.ones((batch, heads, seq_q, 5), np.float32), np.ones((batch, heads, seq_k, 5), np.float32)
        out = subquad.linear_attention(q, k, k, is_causal=causal)
        assert out.shape == q.shape and (seq_k or (out == 0).all())
        assert [g.shape for g in subquad.linear_attention_bwd(out, q, k, k)] == [q.shape, k.shape, k.shape]


def test_strides_and_out(isa):
    fq, fk, v, keywords = inputs(BY_NAME["causal_masked_grouped"], "log", "gate")
    out = subquad.linear_attention(fq, fk, v, **keywords)
    given = strided(np.zeros_like(out))
    assert subquad.linear_attention(strided(fq), strided(fk), strided(v), out=given, **keywords) is given
    np.testing.assert_array_equal(given, out)


def test_closed_gates_and_wrong_ones(isa):
    """Gate 1 keeps the state as it is, gate 0 forgets it."""
    fq, fk, v, keywords = inputs(BY_NAME["causal"])
    ones = np.ones(fk.shape[:3], np.float32)
    assert (subquad.linear_attention(fq, fk, v, gate=ones, **keywords) == 0).all()
    np.testing.assert_allclose(subquad.linear_attention(fq, fk, v, gate=0 * ones, **keywords), v, rtol=2e-6)
    np.testing.assert_allclose(
        subquad.linear_attention(fq, fk, v, decay=ones, **keywords), subquad.linear_attention(fq, fk, v, **keywords)
    )
    for bad in (1.5, -0.1, np.nan):
        for name in ("gate", "decay"):
            with pytest.raises(ValueError, match=rf"^\[linear_attention\] {name}: expected"):
                subquad.linear_attention(fq, fk, v, **{name: bad * ones}, **keywords)


@pytest.mark.parametrize("causal", [False, True])
def test_equal_features_give_means_and_ones_stay_ones(causal, isa):
    rng = np.random.default_rng(0)
    features, v = np.full((2, 3, 70, 5), 0.3, np.float32), rng.standard_normal((2, 3, 70, 4), np.float32)
    keep = rng.random((2, 70)) < 0.7
    keep[:, 0] = True
    out = subquad.linear_attention(features, features, v, is_causal=causal, key_mask=keep)
    means = subquad.running_mean(v, key_mask=keep)
    np.testing.assert_allclose(out, means if causal else np.broadcast_to(means[:, :, -1:], v.shape), atol=1e-6)
    fq, fk = rng.random((2, 2, 3, 70, 5), np.float32)
    ones = subquad.linear_attention(fq, fk, np.ones_like(v), is_causal=causal, key_mask=keep)
    np.testing.assert_allclose(ones, 1, rtol=1e-6)
