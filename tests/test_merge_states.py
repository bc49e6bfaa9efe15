"""Merged attention states against their reference, and against attention over both sets of keys."""

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, as_dtype, strided
from ref import merge_states as ref
from ref.softmax_attention import softmax_attention

SHAPES = [(2, 3, 20, 16), (1, 1, 1, 1), (1, 2, 37, 33), (1, 1, 5, 200)]


def states(shape, dtype="float32"):
    rng = np.random.default_rng(0)
    lses = [(5 * rng.standard_normal(shape[:3])).astype(np.float32) for _ in range(3)]
    outs = [as_dtype(rng.standard_normal(shape), dtype) for _ in range(3)]
    if shape[2] > 6:
        for part, rows in ((0, slice(1, 3)), (1, slice(2, 5))):  # an empty part may hold anything
            lses[part][:, :, rows], outs[part][:, :, rows] = -np.inf, np.nan
    return (outs[0], lses[0], outs[1], lses[1]), outs[2], lses[2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, isa):
    given, dout, dlse = states(shape)
    Expected(ref.merge_states, given).check(subquad.merge_states(*given), "states")
    got = subquad.merge_states_bwd(dout, *given, dlse=dlse)
    Expected(ref.merge_states_bwd, (dout, *given), dict(dlse=dlse)).check(got, "gradients")
    Expected(ref.merge_states_bwd, (dout, *given)).check(subquad.merge_states_bwd(dout, *given), "without dlse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    given, dout, _ = states((2, 3, 20, 16), dtype)
    got = within(framework, subquad.merge_states, given, {})
    Expected(ref.merge_states, given).check(got, dtype, (dtype, "float32"))
    got = within(framework, subquad.merge_states_bwd, (dout, *given), {})
    Expected(ref.merge_states_bwd, (dout, *given)).check(got, dtype, (dtype, "float32") * 2)


def test_strides_and_empty_axes(isa):
    (out1, lse1, out2, lse2), _, _ = states((2, 3, 20, 16))
    plain = subquad.merge_states(out1, lse1, out2, lse2)
    lse_view = np.repeat(lse1[:, :, None], 2, axis=2)[:, :, 0]
    for a, b in zip(plain, subquad.merge_states(strided(out1), lse_view, strided(out2), lse2), strict=True):
        np.testing.assert_array_equal(a, b)
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
        empty = np.zeros(shape, np.float32)
        assert subquad.merge_states(empty, empty[..., 0], empty, empty[..., 0])[0].shape == shape


def test_parts_of_the_keys_make_the_whole(isa):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 2, n, 24)).astype(np.float32) for n in (9, 40, 40))
    merged = None
    for start in range(0, 40, 10):
        keys = slice(start, start + 10)
        state = subquad.softmax_attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
        merged = state if merged is None else subquad.merge_states(*merged, *state)
    for got, whole in zip(merged, softmax_attention(q, k, v, return_lse=True), strict=True):
        np.testing.assert_allclose(got, whole, atol=3e-6)
