"""Random shapes, strides, dtypes, masks and patterns of the sparse family: no crash, no NaN, no mismatch with the
reference.

SUBQUAD_FUZZ_CASES sets the number of cases; function and seed of a failing one are in its name.
"""

import importlib
from dataclasses import replace

import numpy as np
import pytest

import subquad
from budgets import Expected, as_tuple
from cases import as_dtype
from ref.expand_blocks import expand_blocks
from ref.patterns import Blocks, Csr
from ref.transpose_pattern import transpose_pattern
from sparse_cases import GROUPS, probabilities, public, random_blocks, sea_weights
from test_fuzz import on_some_row, some_dtype
from test_fuzz_softmax import CASES, FACTOR, Drawn, attention, call, check, cut, layout, normal, some_case, some_scale
from tolerance import sum_floor

SEEDS = range(max(1, CASES // 6))


def masks_of(rng, case):
    """Holes, padding on the left and lengths of its own for every item; sometimes no mask, or one of the two."""
    keywords = dict(is_causal=case.causal)
    for name, length in (("key_mask", case.seq_k), ("query_mask", case.seq_q)):
        if case.masked or rng.random() < 0.2:
            low, high = np.sort(rng.integers(0, length + 1, (2, case.batch, 1)), axis=0)
            kept = (np.arange(length) >= low) & (np.arange(length) < high)
            keywords[name] = kept & (rng.random(kept.shape) < 0.9)
    return keywords


def hide(keywords, *arrays):
    """NaN where a mask hides: arrays are pairs of [B, heads, tokens, ..] and the name of a mask."""
    for x, name in arrays:
        if keywords.get(name) is not None:
            x[np.broadcast_to(~keywords[name][:, None], x.shape[:3])] = np.nan


def some_columns(rng, keys):
    """K below, at and above the number of keys."""
    return int(rng.choice([1, 2, 8, 9, max(1, keys), keys + 1, int(rng.integers(1, 2 * keys + 3))]))


def some_blocks(rng, case, **keywords):
    sizes = case.batch, case.heads, case.seq_q, case.seq_k, some_columns(rng, case.seq_k)
    return random_blocks(*sizes, int(rng.integers(1, 9)), rng.random(), int(rng.integers(1000)), **keywords)


def weights_or_none(rng, *shape):
    if rng.random() < 0.5:
        return None
    weights = normal(rng, *shape)
    weights[rng.random(shape) < 0.1] = -np.inf
    return weights


def some_csr(rng, case, kept):
    """kept: [B, M], keys that may be in it."""
    taken = (rng.random((case.batch, case.heads, case.seq_q, case.seq_k)) < rng.random()) & kept[:, None, None]
    indptr = np.concatenate([[0], np.cumsum(taken.sum(axis=-1).ravel())])
    indptr = indptr.astype([np.int32, np.int64][rng.integers(2)])
    return Csr(indptr, np.nonzero(taken)[3].astype(np.int32), taken.shape, weights_or_none(rng, int(indptr[-1])))


def some_lists(rng, case, kept):
    """Keys in any order, with repeats and with -1, for one head, those of the keys or those of the queries."""
    heads = int(rng.choice([1, case.heads_kv, case.heads]))
    indices = rng.integers(-1, case.seq_k, (case.batch, heads, case.seq_q, int(rng.integers(0, 30)))).astype(np.int32)
    indices[(indices >= 0) & ~kept[np.arange(case.batch)[:, None, None, None], indices]] = -1
    weights = weights_or_none(rng, *indices.shape)
    return indices if weights is None else (indices, weights)


def some_pattern(rng, case, keywords):
    """A pattern of any form, of keys that key_mask keeps."""
    kept = keywords.get("key_mask", np.ones((case.batch, case.seq_k), bool))
    form = rng.integers(3)
    if form == 0:
        return some_blocks(rng, case, **keywords)
    return some_csr(rng, case, kept) if form == 1 else some_lists(rng, case, kept)


def in_layout(pattern, rng):
    """The pattern as the library takes it, its arrays at other strides."""
    return public(pattern, lambda x: layout(x, rng))


# Against the reference, forward and backward


def sparse_attention(rng, case, dtype):
    inputs, masks = attention(rng, case, dtype)
    pattern = some_pattern(rng, case, masks)
    keywords = dict(scale=some_scale(rng), return_lse=True)
    if rng.random() < 0.5:
        keywords["row_scale"] = normal(rng, *inputs[0].shape[:3])
    given = dict(pattern=in_layout(pattern, rng))
    return Drawn(inputs, keywords, given, dict(pattern=pattern), dtypes=(dtype, "float32"), amplified=4.0)


def selection(rng, case):
    """top_k around and between the numbers of keys, in every group, budget and cap."""
    groups = GROUPS[:2] if case.causal else GROUPS
    return dict(
        top_k=float(rng.choice([1, 1.5, 7.3, case.seq_k, 1e9, rng.uniform(1, case.seq_k + 2)])),
        group=str(rng.choice(groups)), budget=str(rng.choice(["code", "paper"])),
        block_cap=None if rng.random() < 0.6 else int(rng.integers(1, 9)),
    )  # fmt: skip


def sea_attention(rng, case, dtype):
    case = replace(case, heads=case.heads_kv)
    q, k = (0.6 * normal(rng, case.batch, case.heads, n, case.dim) for n in (case.seq_q, case.seq_k))
    v = normal(rng, case.batch, case.heads, case.seq_k, case.dim_v)
    keywords, rows = masks_of(rng, case) | selection(rng, case), q.shape[:3]
    columns = some_columns(rng, case.seq_k)
    keywords["probs"] = probabilities(*rows, columns, int(rng.integers(1000)), bool(rng.integers(2)))
    hidden = [(q, "query_mask"), (k, "key_mask"), (v, "key_mask"), (keywords["probs"], "query_mask")]
    keywords |= dict(scale=some_scale(rng), return_lse=True)
    if rng.random() < 0.6:
        keywords["row_scale"] = rng.random(rows, np.float32)
        hidden.append((keywords["row_scale"], "query_mask"))
    if rng.random() < 0.6:
        keywords["mix"] = rng.random(rows, np.float32)
        hidden.append((keywords["mix"], "query_mask"))
        if rng.random() < 0.5:
            length = int(rng.choice([1, case.seq_q]))
            keywords["context"] = normal(rng, case.batch, case.heads, length, case.dim_v)
    hide(keywords, *hidden)
    # the pooled context weighs values by up to K / n, and its gradient sums over all queries
    return Drawn([as_dtype(x, dtype) for x in (q, k, v)], keywords, dtypes=(dtype, "float32"), amplified=2.0 * columns)


def running_mean(rng, case, dtype):
    v, keywords = normal(rng, case.batch, case.heads, case.seq_k, case.dim_v), masks_of(rng, case)
    keywords = dict(key_mask=keywords.get("key_mask"), num_queries=case.seq_q)
    if rng.random() < 0.5:
        counts = rng.integers(0, 9, case.batch).astype(np.int32)
        sums = normal(rng, case.batch, case.heads, case.dim_v) * (counts > 0)[:, None, None].astype(np.float32)
        keywords["state"] = sums, counts
    hide(keywords, (v, "key_mask"))
    return Drawn([as_dtype(v, dtype)], keywords, amplified=float(case.seq_k))


def block_pool(rng, case, dtype):
    v, masks = normal(rng, case.batch, case.heads, case.seq_k, case.dim_v), masks_of(rng, case)
    columns = some_columns(rng, case.seq_k)
    probs = probabilities(case.batch, case.heads, case.seq_q, columns)
    hide(masks, (v, "key_mask"), (probs, "query_mask"))
    del masks["is_causal"]
    return Drawn([as_dtype(v, dtype)], masks | dict(probs=probs), amplified=float(max(columns, case.seq_k)))


FUNCTIONS = [sparse_attention, sea_attention, running_mean, block_pool]


@pytest.mark.parametrize("draw", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls(draw, seed):
    rng = np.random.default_rng([seed, len(draw.__name__), 1])
    dtype = some_dtype(rng)
    with on_some_row(rng):
        check(draw.__name__, draw(rng, some_case(rng), dtype), dtype, rng)


# Without a gradient of the same form


def compare(name, inputs, keywords, rng, dtypes="float32", floors=0.0):
    expected = Expected(getattr(importlib.import_module(f"ref.{name}"), name), inputs, keywords)
    got = call(getattr(subquad, name), inputs, keywords, rng)
    expected.check(as_tuple(got), name, dtypes, floors, FACTOR)
    return got


def queries_and_keys(rng, case, dim, keywords, dtype, size=0.6):
    q, k = normal(rng, case.batch, case.heads, case.seq_q, dim), normal(rng, case.batch, case.heads_kv, case.seq_k, dim)
    hide(keywords, (q, "query_mask"), (k, "key_mask"))
    return as_dtype(size * q, dtype), as_dtype(size * k, dtype)


def logit_floor(*arrays):
    """What the rounding of logits may cost: differences of them are what is summed."""
    return 4 * sum_floor([np.nansum(np.square(x.astype(np.float64)), axis=-1).max(initial=1) for x in arrays])


@pytest.mark.parametrize("seed", SEEDS)
def test_random_teachers(seed):
    rng = np.random.default_rng([seed, 2])
    dtype, case = some_dtype(rng), some_case(rng)
    keywords = masks_of(rng, case)
    q, k = queries_and_keys(rng, case, case.dim, keywords, dtype)
    teacher = replace(case, heads_kv=int(rng.choice([n for n in range(1, case.heads + 1) if case.heads % n == 0])))
    qt, kt = queries_and_keys(rng, teacher, case.dim_v, keywords, dtype, 0.9)
    floor = logit_floor(q, k, qt, kt)
    with on_some_row(rng):
        columns = dict(num_columns=some_columns(rng, case.seq_k), scale=some_scale(rng))
        masses, squares, _ = compare("teacher_blocks", [q, k], keywords | columns, rng, floors=floor)
        assert (masses >= 0).all() and (squares <= 1 + 1e-5).all()
        keywords |= dict(scale=some_scale(rng), scale_teacher=some_scale(rng))
        compare("attention_divergence", [q, k, qt, kt], keywords, rng, floors=floor)
        dkl, dsse = normal(rng, *q.shape[:3]), normal(rng, *q.shape[:3])
        expected = importlib.import_module("ref.attention_divergence").attention_divergence_bwd
        expected = Expected(expected, [dkl, dsse, q, k, qt, kt], keywords)
        got = call(subquad.attention_divergence_bwd, [dkl, dsse, q, k, qt, kt], keywords, rng)
        expected.check(got, "gradient", dtype, 4 * floor * case.seq_q * case.heads / case.heads_kv, FACTOR)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_columns_and_keys(seed):
    rng = np.random.default_rng([seed, 3])
    case = some_case(rng)
    keywords, columns = masks_of(rng, case), some_columns(rng, case.seq_k)
    x, y = (normal(rng, case.batch, case.heads, case.seq_q, n) for n in (columns, case.seq_k))
    if "key_mask" in keywords:
        y[np.broadcast_to(~keywords["key_mask"][:, None, None], y.shape)] = np.nan
    hide(keywords, (x, "query_mask"), (y, "query_mask"))
    with on_some_row(rng):
        compare("block_sum", [y], keywords | dict(num_columns=columns), rng, floors=4 * sum_floor(case.seq_k))
        compare("expand_values", [x], keywords | dict(num_keys=case.seq_k), rng)


@pytest.mark.parametrize("seed", range(max(1, CASES // 12)))
def test_random_estimates(seed):
    rng = np.random.default_rng([seed, 4])
    dtype, case = some_dtype(rng), some_case(rng)
    case = replace(case, heads=case.heads_kv, seq_q=case.seq_k, dim=min(case.dim, 40))
    columns = int(rng.choice([4, 8, 12, 32])) + (0 if case.causal else 2 * int(rng.integers(2)))
    keywords = dict(is_causal=case.causal, key_mask=masks_of(rng, case).get("key_mask"))
    seed = int(rng.integers(1000))
    weights = sea_weights(case.heads, case.dim, int(rng.integers(1, 40)), columns, case.causal, case.seq_k + 3, seed)
    x = normal(rng, 3, case.batch, case.heads, case.seq_k, case.dim)
    hide(keywords, *((part, "key_mask") for part in x))
    inputs = [as_dtype(part, dtype) for part in x]
    keywords["weights"] = weights
    with on_some_row(rng):
        whole = compare("sea_estimate", inputs, keywords, rng, floors=1e-5)
        if not case.causal:
            return
        state, parts = None, []
        for tokens in map(slice, *cut(rng, case.seq_k)):
            mask = keywords["key_mask"] if keywords["key_mask"] is None else keywords["key_mask"][:, tokens]
            pieces = [layout(part[:, :, tokens], rng) for part in inputs]
            more = dict(is_causal=True, key_mask=mask, state=state, return_state=True)
            *results, state = subquad.sea_estimate(*pieces, weights, **more)
            parts.append(results)
    for pieces, exact in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_allclose(np.concatenate(pieces, axis=2), exact, rtol=1e-4, atol=1e-5)


# Exact: integers


@pytest.mark.parametrize("seed", SEEDS)
def test_random_selections(seed):
    rng = np.random.default_rng([seed, 5])
    case = some_case(rng)
    chosen, keywords = selection(rng, case), masks_of(rng, case)
    keywords |= chosen | dict(skip_dead=bool(rng.integers(2)))
    if "key_mask" not in keywords or rng.random() < 0.5:
        keywords["num_keys"] = case.seq_k
    sizes = case.batch, case.heads, case.seq_q, some_columns(rng, case.seq_k)
    probs = probabilities(*sizes, int(rng.integers(1000)), bool(rng.integers(2)))
    probs[rng.random(probs.shape) < 0.05 * rng.integers(2)] = np.nan
    exact = importlib.import_module("ref.select_blocks").select_blocks(probs, **keywords)
    with on_some_row(rng):
        got = call(subquad.select_blocks, [probs], keywords, rng)
        check_expansion(got, exact)
        q, k, v = (normal(rng, *sizes[:2], n, 3) for n in (case.seq_q, case.seq_k, case.seq_k))
        del keywords["skip_dead"]
        keywords.pop("num_keys", None)
        exact = importlib.import_module("ref.select_blocks").select_blocks(probs, **keywords, num_keys=case.seq_k)
        _, pattern = call(subquad.sea_attention, [q, k, v, probs], keywords | dict(return_pattern=True), rng)
        check_expansion(pattern, exact)


def check_expansion(got, exact):
    for name, value in vars(exact).items():
        np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)
    csr, expanded = got.to_csr(), expand_blocks(exact)
    assert csr.shape == expanded.shape
    np.testing.assert_array_equal(csr.indptr, expanded.indptr)
    np.testing.assert_array_equal(csr.indices, expanded.indices)
    for a, b in zip(subquad.transpose_pattern(csr), transpose_pattern(expanded), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_patterns_expand_and_turn(seed):
    rng = np.random.default_rng([seed, 6])
    case = some_case(rng)
    blocks = some_blocks(rng, case, **masks_of(rng, case))
    with on_some_row(rng):
        check_expansion(in_layout(blocks, rng), blocks)
        csr = some_csr(rng, case, np.ones((case.batch, case.seq_k), bool))
        for a, b in zip(subquad.transpose_pattern(in_layout(csr, rng)), transpose_pattern(csr), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_scores(seed):
    rng = np.random.default_rng([seed, 7])
    dtype, case = some_dtype(rng), some_case(rng)
    scores = normal(rng, case.batch, case.heads, case.seq_q, case.seq_k)
    if rng.random() < 0.5:
        scores = np.round(scores) * rng.choice([-1.0, 1.0], scores.shape)  # ties, zeros of both signs
    for value in (np.nan, np.inf, -np.inf, 1e30):
        scores[rng.random(scores.shape) < 0.1 * rng.integers(2)] = value
    scores = as_dtype(np.clip(scores, -6e4, 6e4) if dtype == "float16" else scores, dtype)
    keywords = dict(group=str(rng.choice(GROUPS)), key_mask=masks_of(rng, case).get("key_mask"), is_causal=case.causal)
    keywords["k"] = int(rng.choice([1, 2, case.seq_k, 3 * case.seq_k, int(rng.integers(1, 200))]))
    with on_some_row(rng):
        got = call(subquad.topk_select, [scores], keywords, rng)
    np.testing.assert_array_equal(got, importlib.import_module("ref.topk_select").topk_select(scores, **keywords))


# Nothing


@pytest.mark.parametrize("axis", range(4))
def test_empty_extents(axis):
    """No item, head, query or key: results of the right shapes, without an element or 0."""
    batch, heads, seq_q, seq_k = (0 if i == axis else n for i, n in enumerate((2, 3, 4, 5)))
    rng = np.random.default_rng(axis)
    q, k, v, dout = (normal(rng, batch, heads, n, 6) for n in (seq_q, seq_k, seq_k, seq_q))
    csr = Csr(np.zeros(batch * heads * seq_q + 1, np.int32), np.zeros(0, np.int32), (batch, heads, seq_q, seq_k))
    lists = np.full((batch, heads, seq_q, 0), -1, np.int32)
    blocks = Blocks(np.zeros((batch, heads, seq_q, 2), np.uint8), 9, np.full((batch, seq_q), seq_k, np.int32), 2)
    with on_some_row(rng):
        for pattern in (public(csr), public(blocks), lists, (lists, lists.astype(np.float32))):
            out, lse = subquad.sparse_attention(q, k, v, pattern, return_lse=True)
            assert out.shape == q.shape and (out == 0).all() and (lse == -np.inf).all() and lse.shape == q.shape[:3]
            gradients = subquad.sparse_attention_bwd(dout, q, k, v, pattern)
            assert all((x == 0).all() and x.shape == y.shape for x, y in zip(gradients, (q, k, v), strict=True))
        for causal in (False, True):
            probs = probabilities(batch, heads, seq_q, 9)
            more = dict(is_causal=causal, mix=np.full(q.shape[:3], 0.5, np.float32))
            out, pattern = subquad.sea_attention(q, k, v, probs, return_pattern=True, **more)
            assert out.shape == q.shape and (out == 0).all() and len(pattern.to_csr().indices) == 0
            *gradients, dmix = subquad.sea_attention_bwd(dout, q, k, v, probs, **more)
            assert all((x == 0).all() and x.shape == y.shape for x, y in zip(gradients, (q, k, v, probs), strict=True))
            assert dmix.shape == q.shape[:3] and (dmix == 0).all()
        assert (subquad.topk_select(normal(rng, batch, heads, seq_q, seq_k), 2) == -1).all()
