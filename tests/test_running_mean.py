"""Running means against their reference, in one piece and in many."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import running_mean as ref
from sparse_cases import masks
from tolerance import sum_floor

SHAPES = [(3, 2, 20, 16), (1, 1, 1, 1), (2, 3, 51, 33), (1, 1, 300, 70), (1, 2, 7, 200)]


def inputs(shape, masked=False, state=False, dtype="float32"):
    rng = np.random.default_rng(0)
    v, keywords = rng.standard_normal(shape) + 0.5, {}
    if masked:
        keywords["key_mask"] = masks(shape[0], 1, shape[2])["key_mask"]
        v[np.broadcast_to(~keywords["key_mask"][:, None], shape[:3])] = np.nan
    if state:
        sums = rng.standard_normal((*shape[:2], shape[3])).astype(np.float32)
        keywords["state"] = 5 * sums, rng.integers(1, 9, shape[0]).astype(np.int32)
    return as_dtype(v, dtype), keywords


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_matches_the_reference(shape, masked, state, isa):
    v, keywords = inputs(shape, masked, state)
    floor = sum_floor(np.nanmax(np.abs(v), initial=0))
    for num_queries in {shape[2], 1, shape[2] // 2 + 1, shape[2] + 9}:
        given = keywords | dict(num_queries=num_queries)
        out, after = subquad.running_mean(v, return_state=True, **given)
        expected = Expected(ref.running_mean, (v,), given)
        expected.check(out, str(given["num_queries"]), floors=floor)
        exact = ref.running_mean(v, return_state=True, **given)[1]
        assert after[0].dtype == np.float32 and after[1].dtype == np.int32
        np.testing.assert_array_equal(after[1], exact[1])
        np.testing.assert_allclose(after[0], exact[0], rtol=1e-5, atol=1e-4)
        dout = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
        backward = Expected(lambda dout, v=v, **k: ref.running_mean_bwd(dout, v, **k), (dout,), given)
        backward.check(subquad.running_mean_bwd(dout, v, **given), "dv", floors=sum_floor(4 * np.abs(dout)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    v, keywords = inputs((3, 2, 20, 16), True, True, dtype)
    got = within(framework, subquad.running_mean, (v,), keywords)
    Expected(ref.running_mean, (v,), keywords).check(got, dtype, dtype)
    dout = as_dtype(np.random.default_rng(1).standard_normal(v.shape), dtype)
    got = within(framework, subquad.running_mean_bwd, (dout, v), keywords)
    Expected(lambda dout, **k: ref.running_mean_bwd(dout, v, **k), (dout,), keywords).check(got, dtype, dtype)


@pytest.mark.parametrize("cuts", [range(1, 20), (0, 3, 3, 17), (20,)], ids=str)
def test_pieces_are_one_pass(cuts, isa):
    v, keywords = inputs((3, 2, 20, 16), True)
    mask, state, parts, edges = keywords["key_mask"], None, [], [0, *cuts, 20]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part, cut = np.ascontiguousarray(v[:, :, low:high]), np.ascontiguousarray(mask[:, low:high])
        out, state = subquad.running_mean(part, key_mask=cut, state=state, return_state=True)
        parts.append(out)
    Expected(ref.running_mean, (v,), keywords).check(np.concatenate(parts, axis=2), floors=sum_floor(3))
    np.testing.assert_array_equal(state[1], mask.sum(axis=1))


def test_later_values_and_padding_change_no_bit(isa):
    v, keywords = inputs((2, 2, 40, 16), True)
    out = subquad.running_mean(v, **keywords)
    for value in (np.nan, np.inf, 1e30):
        later = v.copy()
        later[:, :, 29:] = value
        np.testing.assert_array_equal(subquad.running_mean(later, **keywords)[:, :, :29], out[:, :, :29])
    mask = keywords["key_mask"][1]
    alone = subquad.running_mean(np.ascontiguousarray(v[1:][:, :, mask]))
    np.testing.assert_array_equal(out[1:][:, :, mask], alone)


def test_a_constant_stays_and_nothing_is_zero(isa):
    v = np.full((2, 1, 9, 5), 3, np.float32)
    np.testing.assert_array_equal(subquad.running_mean(v), v)
    out = subquad.running_mean(v, num_queries=12)
    assert (out[:, :, :3] == 0).all() and (out[:, :, 3:] == 3).all()
    none = np.zeros((2, 9), bool)
    out, (total, count) = subquad.running_mean(np.nan * v, key_mask=none, return_state=True)
    assert (out == 0).all() and (total == 0).all() and (count == 0).all()
    assert (subquad.running_mean_bwd(out + 1, np.nan * v, key_mask=none) == 0).all()
    for shape in ((0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)):
        out = subquad.running_mean(np.ones(shape, np.float32), num_queries=3)
        assert out.shape == (*shape[:2], 3, 4) and (shape[2] or (out == 0).all())
        assert subquad.running_mean_bwd(out, np.ones(shape, np.float32)).shape == shape
        assert subquad.running_mean(np.ones(shape, np.float32), num_queries=0).shape == (*shape[:2], 0, 4)


def test_strides_and_out(isa):
    v, keywords = inputs((3, 2, 20, 16), True)
    out = subquad.running_mean(v, **keywords)
    given = strided(np.zeros_like(out))
    assert subquad.running_mean(strided(v), out=given, **keywords) is given
    np.testing.assert_array_equal(given, out)
    dv = subquad.running_mean_bwd(out, v, **keywords)
    np.testing.assert_array_equal(subquad.running_mean_bwd(strided(out), strided(v), **keywords), dv)
