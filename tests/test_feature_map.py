"""Feature maps against their reference, and the kernels they estimate."""

import math

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import feature_map as ref
from tolerance import sum_floor

SHAPES = [(2, 4, 21, 16, 24), (1, 2, 1, 1, 1), (1, 6, 37, 33, 17), (1, 1, 5, 200, 70)]  # B, H, N, D, F
MAPS = [("positive", False), ("positive", True), ("hyperbolic", False), ("hyperbolic", True), ("trig", False),
        ("relu", False), ("elu", False)]  # fmt: skip


def given(shape, features, masked=False, dtype="float32", blocks=2, size=1.0):
    rng = np.random.default_rng(0)
    *shape, count = shape
    x, mask = size * rng.standard_normal(shape), rng.random((shape[0], shape[2])) < 0.7
    keywords = dict(features=features)
    if masked:
        x[np.broadcast_to(~mask[:, None], shape[:3])] = np.nan
        keywords["mask"] = mask
    if features != "elu":
        rows = rng.standard_normal((min(blocks or 1, shape[1]), count, shape[3])).astype(np.float32)
        keywords["projection"] = rows if blocks else rows[0]
    return as_dtype(x, dtype), keywords


def exponent_floors(x, dout, keywords, log):
    """What the order of the sums in an exponent may cost its exponential: in out, and in dx and dprojection."""
    if log or keywords["features"] not in ("positive", "hyperbolic"):
        return 0.0, 0.0
    x, dout = ref.clear_masked(x, keywords.get("mask")), np.abs(np.nan_to_num(dout.astype(np.float64)))
    scaled, rows, _, n = ref.projected(x, keywords["projection"], keywords.get("scale"), np.float64)
    size = np.abs(scaled) @ np.abs(rows).swapaxes(-1, -2) + n
    size = np.concatenate([size, size], axis=-1) if keywords["features"] == "hyperbolic" else size
    terms = ref.feature_map(x, **keywords) * size
    g = (dout * terms).reshape(*size.shape[:3], -1, rows.shape[1]).sum(axis=3)
    root = (keywords.get("scale") or x.shape[-1] ** -0.5) ** 0.5
    dx = root * (g @ np.abs(rows) + g.sum(axis=-1, keepdims=True) * np.abs(scaled))
    drows = (g.swapaxes(-1, -2) @ np.abs(scaled)).sum(axis=(0, 1))
    return sum_floor(terms), [sum_floor(dx), sum_floor(drows)]


def forward_and_backward(x, keywords, log, dtype="float32", run=lambda f, xs, kw: f(*xs, **kw)):
    """Compares both passes; `run` may carry them out in another framework."""
    trig, name = keywords["features"] == "trig", f"{keywords['features']} log={log}"
    more = keywords | dict(log=log)
    expected = Expected(ref.feature_map, (x,), more | dict(return_log_factor=trig))
    kinds = ("float32" if log else dtype, "float32")[: 2 if trig else 1]
    rng = np.random.default_rng(1)
    douts = [as_dtype(rng.standard_normal(y.shape), kind) for y, kind in zip(expected.exact, kinds, strict=True)]
    floor, floors = exponent_floors(x, douts[0], keywords, log)
    expected.check(run(subquad.feature_map, (x,), more | dict(return_log_factor=trig)), name, kinds, floor)
    more |= dict(dlog_factor=douts[1]) if trig else {}
    expected = Expected(ref.feature_map_bwd, (douts[0], x), more)
    got = run(subquad.feature_map_bwd, (douts[0], x), more)
    expected.check(got, f"gradient of {name}", (dtype, "float32")[: len(expected.exact)], floors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("features", "log"), MAPS)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(shape, features, log, masked, isa):
    x, keywords = given(shape, features, masked)
    forward_and_backward(x, keywords if features == "elu" else keywords | dict(scale=0.3), log)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "log"), [("positive", True), ("trig", False), ("relu", False), ("elu", False)])
def test_every_dtype_and_framework(dtype, features, log, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    for blocks in (2, None):
        x, keywords = given(SHAPES[0], features, True, dtype, blocks)
        run = lambda f, xs, kw: within(framework, f, xs, kw)  # noqa: E731
        forward_and_backward(x, keywords, log, dtype, run)


def test_strides_groups_and_empty_axes(isa):
    x, keywords = given(SHAPES[2], "trig")
    out = subquad.feature_map(x, **keywords)
    rows = keywords.pop("projection")
    np.testing.assert_array_equal(subquad.feature_map(strided(x), strided(rows[None])[0], **keywords), out)
    np.testing.assert_array_equal(subquad.feature_map(x[:, 3:], rows[1], **keywords), out[:, 3:])
    for shape in ((0, 2, 5, 33), (2, 0, 5, 33), (2, 2, 0, 33)):
        empty = np.ones(shape, np.float32)
        out = subquad.feature_map(empty, rows[0], **keywords)
        assert out.shape == (*shape[:3], 34)
        dx, drows = subquad.feature_map_bwd(out, empty, rows[0], **keywords)
        assert dx.shape == shape and (drows == 0).all()


def test_logarithms_of_huge_rows_are_finite(isa):
    """|x~|^2 / 2 about 1000: the features underflow, their logarithms keep their precision."""
    x, keywords = given(SHAPES[0], "positive", size=22.0)
    log = subquad.feature_map(x, log=True, **keywords)
    exact = ref.feature_map(x.astype(np.float64), log=True, **keywords)
    assert exact.min() < -500
    np.testing.assert_allclose(log, exact, rtol=0, atol=2e-6 * np.abs(exact).max())
    assert (subquad.feature_map(x, **keywords) == 0).any()


@pytest.mark.statistical
@pytest.mark.parametrize("features", ["positive", "hyperbolic", "trig"])
def test_inner_products_estimate_the_softmax_kernel(features):
    """200000 rows in 200 blocks: the mean of 200 estimates within 5 of its standard errors."""
    rng = np.random.default_rng(3)
    x = np.repeat(0.5 * rng.standard_normal((1, 1, 2, 8)), 200, axis=1).astype(np.float32)
    rows = subquad.random_normal((200, 1000, 8), seed=5)
    if features == "trig":
        phi, factor = subquad.feature_map(x, rows, features, return_log_factor=True)
        weight = np.exp(factor.astype(np.float64).sum(-1))[0]
    else:
        phi, weight = subquad.feature_map(x, rows, features), 1
    estimates = (phi[0, :, 0].astype(np.float64) * phi[0, :, 1]).sum(-1) * weight
    kernel = math.exp(x[0, 0, 0] @ x[0, 0, 1] / math.sqrt(8))
    assert abs(estimates.mean() - kernel) <= 5 * estimates.std() / math.sqrt(200)
