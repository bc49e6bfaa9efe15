"""Attention over a pattern against its reference: the forms of a pattern, gradients, edges and laws."""

from functools import lru_cache

import numpy as np
import pytest

import subquad
from budgets import Expected, within
from cases import DTYPES, Case, as_dtype, strided
from ref import sparse_attention as ref
from ref.expand_blocks import expand_blocks
from ref.patterns import Csr
from sparse_cases import dense, masks, public, random_blocks, random_csr, random_indices

CASES = [
    Case("plain"),
    Case("tails", seq_q=37, seq_k=51, dim=33, dim_v=17),
    Case("one_token", seq_q=1, seq_k=1),
    Case("one_query", seq_q=1, seq_k=300),
    Case("dims_of_one", dim=1, dim_v=1),
    Case("dims_65_33", dim=65, dim_v=33),
    Case("wide", batch=1, heads=1, heads_kv=1, dim=200, dim_v=130),
    Case("grouped", heads=6, heads_kv=2, seq_q=33, seq_k=19),
    Case("masked_grouped", masked=True, heads=4, heads_kv=2, seq_q=21, seq_k=30),
    Case("causal", causal=True, masked=True, seq_q=40, seq_k=40),
    Case("causal_blind_rows", causal=True, seq_q=40, seq_k=23),
    Case("longer", batch=1, heads=2, heads_kv=1, seq_q=70, seq_k=260, dim=64, dim_v=64, causal=True),
]
BY_NAME = {case.name: case for case in CASES}
KINDS = ["blocks", "csr", "csr_weights", "indices", "indices_weights"]


def pattern_of(case, kind):
    sizes = case.batch, case.heads, case.seq_q, case.seq_k
    if kind == "blocks":
        keywords = masks(case.batch, case.seq_q, case.seq_k, case.masked, case.causal)
        return random_blocks(*sizes, 8, 5, **keywords)
    if kind.startswith("csr"):
        return random_csr(*sizes, weighted=kind != "csr", index=np.int32 if kind == "csr" else np.int64)
    heads = {"indices": case.heads, "indices_weights": case.heads_kv}[kind]
    heads = 1 if case.name == "tails" else heads
    return random_indices(case.batch, heads, case.seq_q, case.seq_k, 13, weighted=kind != "indices")


def inputs(case, dtype="float32"):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((case.batch, case.heads, case.seq_q, case.dim))
    k = rng.standard_normal((case.batch, case.heads_kv, case.seq_k, case.dim))
    v = rng.standard_normal((case.batch, case.heads_kv, case.seq_k, case.dim_v))
    return tuple(as_dtype(x, dtype) for x in (1.5 * q, k, v))


def rows_of(case, seed=2):
    return np.random.default_rng(seed).standard_normal((case.batch, case.heads, case.seq_q)).astype(np.float32)


def cotangents(case, dtype="float32"):
    dout = np.random.default_rng(1).standard_normal((case.batch, case.heads, case.seq_q, case.dim_v))
    return as_dtype(dout, dtype), rows_of(case, 3)


def draws(case):
    """Many where they are cheap: among few numbers one evaluation may be exact by luck."""
    return 4 if case.seq_q * case.seq_k > 2000 else 16


@lru_cache
def expected(case, kind, dtype="float32"):
    keywords = dict(pattern=pattern_of(case, kind), row_scale=rows_of(case), return_lse=True)
    return Expected(ref.sparse_attention, inputs(case, dtype), keywords, draws=draws(case))


@lru_cache
def expected_bwd(case, kind, dtype="float32"):
    dout, dlse = cotangents(case, dtype)
    keywords = dict(pattern=pattern_of(case, kind), row_scale=rows_of(case), dlse=dlse)
    return Expected(ref.sparse_attention_bwd, (dout, *inputs(case, dtype)), keywords, draws=draws(case))


# Matches the reference


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(case, kind, isa):
    pattern = public(pattern_of(case, kind))
    got = subquad.sparse_attention(*inputs(case), pattern, row_scale=rows_of(case), return_lse=True)
    expected(case, kind).check(got, f"{case} {kind}")
    alone = subquad.sparse_attention(*inputs(case), pattern, row_scale=rows_of(case))
    np.testing.assert_array_equal(alone, got[0])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_matches_the_reference(case, kind, isa):
    dout, dlse = cotangents(case)
    pattern, keywords = public(pattern_of(case, kind)), dict(row_scale=rows_of(case), dlse=dlse)
    got = subquad.sparse_attention_bwd(dout, *inputs(case), pattern, **keywords)
    expected_bwd(case, kind).check(got, f"{case} {kind}")
    for a, b in zip(got, subquad.sparse_attention_bwd(dout, *inputs(case), pattern, **keywords), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_options(kind, isa):
    case = BY_NAME["grouped"]
    q, k, v = inputs(case)
    dout, _ = cotangents(case)
    pattern = pattern_of(case, kind)
    got = subquad.sparse_attention(q, k, v, public(pattern), scale=0.3, return_lse=True)
    Expected(ref.sparse_attention, (q, k, v), dict(pattern=pattern, scale=0.3, return_lse=True)).check(got)
    gradients = subquad.sparse_attention_bwd(dout, q, k, v, public(pattern), scale=0.3)
    Expected(ref.sparse_attention_bwd, (dout, q, k, v), dict(pattern=pattern, scale=0.3)).check(gradients)
    saved = dict(zip(("out", "lse"), got, strict=True))
    saved = subquad.sparse_attention_bwd(dout, q, k, v, public(pattern), scale=0.3, **saved)
    Expected(ref.sparse_attention_bwd, (dout, q, k, v), dict(pattern=pattern, scale=0.3)).check(saved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["blocks", "csr", "indices_weights"])
def test_every_dtype_and_framework(dtype, kind, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    case = BY_NAME["masked_grouped"]
    pattern = pattern_of(case, "csr" if kind == "csr" else kind)
    made, keywords = public(pattern, framework.make), dict(row_scale=rows_of(case))
    call = lambda *xs, **given: subquad.sparse_attention(*xs, made, return_lse=True, **given)  # noqa: E731
    got = within(framework, call, inputs(case, dtype), keywords)
    expected(case, kind, dtype).check(got, kind, (dtype, "float32"))
    dout, dlse = cotangents(case, dtype)
    call = lambda *xs, **given: subquad.sparse_attention_bwd(*xs, made, **given)  # noqa: E731
    got = within(framework, call, (dout, *inputs(case, dtype)), keywords | dict(dlse=dlse))
    expected_bwd(case, kind, dtype).check(got, kind, (dtype, dtype, dtype, "float32"))


# Forms of a pattern


@pytest.mark.parametrize("case", [BY_NAME[name] for name in ("tails", "masked_grouped", "causal", "longer")], ids=str)
def test_the_forms_of_a_pattern_are_one_matrix(case, isa):
    blocks = pattern_of(case, "blocks")
    q, k, v = inputs(case)
    dout, _ = cotangents(case)
    csr = expand_blocks(blocks)
    taken = dense(csr)
    lists = np.where(taken, np.arange(case.seq_k), -1).astype(np.int32)
    patterns = [public(blocks), public(csr), lists, (lists, np.zeros(lists.shape, np.float32))]
    outs = [subquad.sparse_attention(q, k, v, pattern, return_lse=True) for pattern in patterns]
    gradients = [subquad.sparse_attention_bwd(dout, q, k, v, pattern) for pattern in patterns]
    for first, *others in [*zip(*outs, strict=True), *zip(*gradients, strict=True)]:
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-6, atol=2e-6 * np.abs(first[np.isfinite(first)]).max())


def test_all_keys_are_exact_attention(isa):
    case = BY_NAME["causal_blind_rows"]
    q, k, v = inputs(case)
    dout, dlse = cotangents(case)
    blocks = random_blocks(case.batch, case.heads, case.seq_q, case.seq_k, 8, 99, density=1.1, is_causal=True)
    exact = subquad.softmax_attention(q, k, v, is_causal=True, return_lse=True)
    for a, b in zip(subquad.sparse_attention(q, k, v, public(blocks), return_lse=True), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    exact = subquad.softmax_attention_bwd(dout, q, k, v, is_causal=True, dlse=dlse)
    for a, b in zip(subquad.sparse_attention_bwd(dout, q, k, v, public(blocks), dlse=dlse), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_order_repeats_and_parts_of_a_list(isa):
    case = BY_NAME["grouped"]
    q, k, v = inputs(case)
    indices, weights = random_indices(case.batch, case.heads, case.seq_q, case.seq_k, 12, weighted=True)
    out, lse = subquad.sparse_attention(q, k, v, (indices, weights), return_lse=True)
    order = np.random.default_rng(0).permutation(12)
    turned = tuple(np.ascontiguousarray(x[..., order]) for x in (indices, weights))
    turned = subquad.sparse_attention(q, k, v, turned)
    np.testing.assert_allclose(turned, out, atol=2e-6)
    copies = np.repeat(indices, 3, axis=-1), np.repeat(weights - np.float32(np.log(3)), 3, axis=-1)
    np.testing.assert_allclose(subquad.sparse_attention(q, k, v, copies), out, atol=2e-6)
    parts = []
    for part in (slice(0, 4), slice(4, 5), slice(5, 12)):
        cut = np.ascontiguousarray(indices[..., part]), np.ascontiguousarray(weights[..., part])
        parts.append(subquad.sparse_attention(q, k, v, cut, return_lse=True))
    merged = subquad.merge_states(*subquad.merge_states(*parts[0], *parts[1]), *parts[2])
    np.testing.assert_allclose(merged[0], out, atol=2e-6)
    np.testing.assert_allclose(merged[1], lse, rtol=2e-6, atol=2e-6)


# Edges and laws


def without_some_keys(kind, case):
    """A pattern of which no row has a key m % 4 = 1."""
    sizes = case.batch, case.heads, case.seq_q, case.seq_k
    if kind == "blocks":
        return random_blocks(*sizes, 8, 5, key_mask=np.broadcast_to(np.arange(case.seq_k) % 4 != 1, (2, case.seq_k)))
    if kind == "csr":
        taken = dense(pattern_of(case, kind)) & (np.arange(case.seq_k) % 4 != 1)
        indptr = np.concatenate([[0], np.cumsum(taken.sum(axis=-1).ravel())])
        return Csr(indptr, np.nonzero(taken)[3].astype(np.int32), taken.shape)
    indices, weights = pattern_of(case, kind)
    return np.where(indices % 4 == 1, -1, indices).astype(np.int32), weights


@pytest.mark.parametrize("kind", ["blocks", "csr", "indices_weights"])
def test_tokens_outside_of_a_pattern_have_no_effect(kind, isa):
    case = BY_NAME["masked_grouped"]
    q, k, v = inputs(case)
    dout, _ = cotangents(case)
    pattern = public(without_some_keys(kind, case))
    out, lse = subquad.sparse_attention(q, k, v, pattern, return_lse=True)
    gradients = subquad.sparse_attention_bwd(dout, q, k, v, pattern)
    empty = np.isneginf(lse)
    assert empty.any() and (out[empty] == 0).all() and (gradients[0][empty] == 0).all()
    for value in (np.nan, np.inf):
        k[:, :, 1::4], v[:, :, 1::4] = value, value
        if kind != "indices_weights":  # there rows of weights 0 may read their query
            q[empty] = value
        again = subquad.sparse_attention(q, k, v, pattern, return_lse=True)
        again += subquad.sparse_attention_bwd(dout, q, k, v, pattern)
        for a, b in zip(again, (out, lse, *gradients), strict=True):
            np.testing.assert_array_equal(a, b)
    assert all((gradient[:, :, 1::4] == 0).all() for gradient in gradients[1:])


def test_nan_reaches_the_rows_that_take_it(isa):
    case = BY_NAME["plain"]
    q, k, v = inputs(case)
    pattern = pattern_of(case, "csr")
    clean = subquad.sparse_attention(q, k, v, public(pattern))
    takes = dense(pattern)[..., 4]
    for array in (k, v):
        array[:, :, 4] = np.nan
        out = subquad.sparse_attention(q, k, v, public(pattern))
        np.testing.assert_array_equal(np.isnan(out).all(axis=-1), takes)
        np.testing.assert_array_equal(out[~takes], clean[~takes])


def test_infinite_scores(isa):
    q = np.ones((1, 1, 3, 2), np.float32)
    k = np.array([[[[1, 1], [-np.inf, 0], [np.inf, 0]]]], np.float32)
    v = np.arange(3, dtype=np.float32)[None, None, :, None]
    pattern = np.array([[[[0, 1], [1, -1], [0, 2]]]], np.int32)
    out, lse = subquad.sparse_attention(q, k, v, pattern, return_lse=True)
    assert (out[0, 0, :2] == 0).all() and np.isfinite(lse[0, 0, 0]) and np.isneginf(lse[0, 0, 1])
    assert np.isnan(out[0, 0, 2]).all()


def test_huge_logits(isa):
    q, k, v = inputs(BY_NAME["tails"])
    for kind in KINDS:
        pattern = public(pattern_of(BY_NAME["tails"], kind))
        out, lse = subquad.sparse_attention(3e3 * q, 3e3 * k, v, pattern, return_lse=True)
        assert np.isfinite(out).all() and not np.isnan(lse).any()
        assert all(np.isfinite(x).all() for x in subquad.sparse_attention_bwd(out, 3e3 * q, 3e3 * k, v, pattern))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_axes(shape, isa):
    batch, heads, seq_q, seq_k = shape
    q, k = np.ones((batch, heads, seq_q, 5), np.float32), np.ones((batch, max(heads, 1), seq_k, 5), np.float32)
    empty = np.full((batch, heads, seq_q, 2), -1, np.int32)
    for pattern in (random_blocks(*shape, 6, 3), random_csr(*shape), empty):
        out, lse = subquad.sparse_attention(q, k, k, public(pattern), return_lse=True)
        assert out.shape == q.shape and (out[np.isneginf(lse)] == 0).all() and (seq_k or np.isneginf(lse).all())
        gradients = subquad.sparse_attention_bwd(q, q, k, k, public(pattern))
        assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]
        assert all(np.isfinite(g).all() for g in gradients)


def test_strides_and_out(isa):
    case = BY_NAME["grouped"]
    q, k, v = inputs(case)
    dout, _ = cotangents(case)
    for kind in KINDS:
        pattern = public(pattern_of(case, kind))
        out = subquad.sparse_attention(q, k, v, pattern)
        np.testing.assert_array_equal(subquad.sparse_attention(strided(q), strided(k), strided(v), pattern), out)
        given = strided(np.zeros_like(out))
        assert subquad.sparse_attention(q, k, v, pattern, out=given) is given
        np.testing.assert_array_equal(given, out)
        plain = subquad.sparse_attention_bwd(dout, q, k, v, pattern)
        views = subquad.sparse_attention_bwd(strided(dout), strided(q), strided(k), strided(v), pattern)
        for a, b in zip(plain, views, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"^\[sparse_attention\] out: "):
        subquad.sparse_attention(q, k, np.ascontiguousarray(k), pattern, out=q)


def test_foreign_patterns_are_checked(isa):
    """Nothing of a pattern is trusted: order, repeats and range of keys, row pointers, counts and places of blocks."""
    q, k, v = inputs(Case("small", 1, 1, 1, 3, 4, 5, 5))
    indptr, indices = np.array([0, 2, 3, 3], np.int64), np.array([0, 3, 1], np.int32)
    bits, visible = np.ones((1, 1, 3, 1), np.uint8), np.full((1, 3), 4, np.int32)
    places = np.arange(4, dtype=np.int32)[None]

    def csr(indptr, indices):
        return subquad.CsrPattern(indptr, indices, (1, 1, 3, 4))

    def blocks(visible=visible, positions=places, cap=2, columns=2):
        return subquad.BlockPattern(bits, columns, visible, cap, positions, 4)

    for good in (csr(indptr, indices), blocks(), blocks(positions=None)):
        assert np.isfinite(subquad.sparse_attention(q, k, v, good)).all()
    wrong = [
        csr(indptr[::-1].copy(), indices), csr(indptr + 1, indices), csr(indptr, indices - 1), csr(indptr, indices + 1),
        csr(indptr, indices[[1, 0, 2]]), csr(indptr, indices[[0, 0, 2]]), csr(indptr, indices[:2]),
        csr(indptr[:3], indices), blocks(visible + 1), blocks(visible - 5), blocks(positions=places + 1),
        blocks(positions=places - 1), blocks(cap=0), blocks(columns=0), blocks(columns=9),
        np.full((1, 1, 3, 2), 4, np.int32), np.full((1, 1, 3, 2), -2, np.int32),
    ]  # fmt: skip
    for number, pattern in enumerate(wrong):
        with pytest.raises(ValueError, match=r"^\[sparse_attention\] [\w ]+: expected"):
            subquad.sparse_attention(q, k, v, pattern)
            pytest.fail(f"pattern {number} was taken")
