"""The references of the sparse family and their operators against facts they were not written from."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ref.attention_divergence import attention_divergence, attention_divergence_bwd
from ref.block_map import column, key_columns, start
from ref.block_pool import block_pool, block_pool_bwd
from ref.block_sum import block_sum
from ref.expand_blocks import expand_blocks
from ref.expand_values import expand_values
from ref.loops import problem, sees
from ref.patterns import entries, pack, unpack
from ref.running_mean import running_mean, running_mean_bwd
from ref.select_blocks import select_blocks
from ref.softmax_attention import softmax_attention
from ref.sparse_attention import sparse_attention, sparse_attention_bwd
from ref.teacher_blocks import teacher_blocks
from ref.topk_select import topk_select
from ref.transpose_pattern import transpose_pattern
from ref.visible_keys import visible_keys
from sparse_cases import CAUSAL_GROUPS, GROUPS, dense, masks, probabilities, random_blocks, random_csr, random_indices
from test_reference_softmax import assert_gradients

VISIBILITIES = [(False, False), (False, True), (True, False), (True, True)]
PATTERNS = ["blocks", "csr", "csr_weights", "indices", "indices_weights"]


def pattern_of(kind, batch=2, heads=4, seq_q=5, seq_k=7):
    if kind == "blocks":
        return random_blocks(batch, heads, seq_q, seq_k, 4, 2, **masks(batch, seq_q, seq_k))
    if kind.startswith("csr"):
        return random_csr(batch, heads, seq_q, seq_k, 0.5, weighted=kind != "csr")
    return random_indices(batch, 2, seq_q, seq_k, 6, weighted=kind != "indices")


# Columns and blocks


def test_columns_are_the_nearest_interpolation_in_exact_numbers():
    """Column = the one whose span of tokens has the middle of the token in it; a middle on the border goes left."""
    for K in (7, 64, 96, 128):
        for n in (1, 2, K - 1, K, K + 1, 1000, 8191):
            for j in {0, n // 3, n // 2, n - 1, *np.random.default_rng(n).integers(0, n, 200).tolist()}:
                assert column(j, n, K) == math.ceil(Fraction(2 * j + 1, 2) * K / n) - 1
            for c in range(K + 1):
                assert start(c, n, K) == math.floor(Fraction(c * n, K) + Fraction(1, 2))
        assert column(0, 1, K) == -(-K // 2) - 1


def test_blocks_are_a_partition():
    rng = np.random.default_rng(0)
    pairs = [(int(n), int(K)) for n, K in zip(2 ** rng.uniform(0, 20, 300), rng.integers(1, 513, 300), strict=True)]
    for n, K in [*pairs, (64, 64), (192, 64), (2**20, 512)]:
        edges = start(np.arange(K + 1), n, K)
        assert edges[0] == 0 and edges[-1] == n
        widths = np.diff(edges)
        assert widths.min() >= n // K and widths.max() <= -(-n // K)
        assert (widths > 0).sum() == min(n, K)
        ranks = np.unique(np.concatenate([edges[:-1], edges[1:] - 1, rng.integers(0, n, 50)]))
        ranks = ranks[(ranks >= 0) & (ranks < n)]
        columns = column(ranks, n, K)
        assert (edges[columns] <= ranks).all() and (ranks < edges[columns + 1]).all()
        if n == K:
            assert (columns == ranks).all()


def test_bits_are_in_bytes_from_the_lowest():
    selected = np.zeros((1, 1, 1, 19), bool)
    selected[..., [0, 9, 18]] = True
    assert pack(selected).ravel().tolist() == [1, 2, 4]
    np.testing.assert_array_equal(unpack(pack(selected), 19), selected)


@pytest.mark.parametrize("masked, causal", VISIBILITIES)
def test_visible_keys_and_columns_by_loops(masked, causal):
    keywords = masks(3, 5, 8, masked, causal)
    counts, positions = visible_keys(
        keywords.get("key_mask"), keywords.get("query_mask"), batch=3, num_queries=5, num_keys=8, is_causal=causal
    )
    columns = key_columns(3, 5, 8, 4, **keywords)
    for b, n in np.ndindex(3, 5):
        seen = [m for m in range(8) if sees(b, n, m, 5, 8, **keywords)]
        assert counts[b, n] == len(seen) and (positions[b, : len(seen)] == seen).all()
        expected = {m: column(r, len(seen), 4) for r, m in enumerate(seen)}
        assert columns[b, n].tolist() == [expected.get(m, -1) for m in range(8)]


# Selection


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("masked, causal", VISIBILITIES)
def test_topk_select_by_sorting_pairs(group, masked, causal):
    rng = np.random.default_rng(1)
    scores = rng.integers(-2, 3, (2, 3, 4, 6)).astype(np.float64)
    scores[rng.random(scores.shape) < 0.3] = np.nan
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[scores == 0] *= -1.0
    mask = masks(2, 4, 6, masked, causal).get("key_mask")
    got = topk_select(scores, 5, group=group, key_mask=mask, is_causal=causal)
    wanted = {}
    for b, h, n, m in np.ndindex(scores.shape):
        if sees(b, n, m, 4, 6, mask, None, causal):
            row, flat = {
                "query": ((b, h, n), m), "row_heads": ((b, n), h * 6 + m),
                "head": ((b, h), n * 6 + m), "batch": ((b,), (h * 4 + n) * 6 + m),
            }[group]  # fmt: skip
            value = scores[b, h, n, m]
            wanted.setdefault(row, []).append((1, 0, flat) if math.isnan(value) else (0, -value, flat))
    for row in np.ndindex(got.shape[:-1]):
        best = sorted(flat for *_, flat in sorted(wanted.get(row, []))[:5])
        assert got[row].tolist() == best + [-1] * (5 - len(best))


@pytest.mark.parametrize("top_k", [1, 3, 2.5, 64])
@pytest.mark.parametrize("budget", ["code", "paper"])
@pytest.mark.parametrize("skip_dead", [False, True])
def test_groups_take_as_many_as_their_budget(top_k, budget, skip_dead):
    heads, seq, K = 3, 9, 6
    probs = probabilities(3, heads, seq, K, ties=True)
    for group in GROUPS:
        longer = dict(num_keys=100)  # of which a row would take less than one column
        causal = [masks(3, seq, seq, causal=True)] if group in CAUSAL_GROUPS else []
        for keywords in [masks(3, seq, seq), longer, *causal]:
            blocks = select_blocks(probs, top_k=top_k, group=group, budget=budget, skip_dead=skip_dead, **keywords)
            selected = unpack(blocks.bits, K)
            for b, h, n in np.ndindex(3, heads, seq):
                here = {"query": (b, h, n), "row_heads": (b, slice(None), n), "head": (b, h), "batch": (b,)}[group]
                rows = [n] if group in CAUSAL_GROUPS else range(seq)
                counts = [int(blocks.visible[b, i]) for i in rows if blocks.visible[b, i]]
                times = heads if group in ("row_heads", "batch") else 1
                live = times * sum(min(c, K) if skip_dead else K for c in counts)
                if budget == "paper":
                    wanted = times * sum(max(1, round(Fraction(top_k) * K / c)) for c in counts)
                elif group in CAUSAL_GROUPS:
                    wanted = round(Fraction(top_k) * times * K / counts[0]) if counts else 0
                else:
                    wanted = round(Fraction(top_k) * times * K)
                assert selected[here].sum() == (min(max(wanted, 1), live) if live else 0)
                taken, left = probs[here][selected[here]], probs[here][~selected[here]]
                if taken.size and left.size and not skip_dead and (blocks.visible[b] > 0).all():
                    assert taken.min() >= left.max()


def test_halves_round_to_even():
    blocks = select_blocks(probabilities(1, 1, 8, 20), top_k=5, group="query")  # 5 * 20 / 8 = 12.5
    assert (unpack(blocks.bits, 20).sum(axis=-1) == 12).all() and blocks.block_cap == 5


# Patterns


@pytest.mark.parametrize("masked, causal", VISIBILITIES)
@pytest.mark.parametrize("cap", [1, 2, 99])
def test_expanded_blocks_by_columns_of_keys(masked, causal, cap):
    keywords = masks(3, 6, 11, masked, causal)
    blocks = random_blocks(3, 2, 6, 11, 5, cap, **keywords)
    csr, selected = expand_blocks(blocks), unpack(blocks.bits, 5)
    columns, taken = key_columns(3, 6, 11, 5, **keywords), dense(csr)
    for b, h, n in np.ndindex(3, 2, 6):
        for c in range(5):
            block = np.nonzero(columns[b, n] == c)[0]
            kept = block[max(0, len(block) - cap) :] if selected[b, h, n, c] else []
            assert np.nonzero(taken[b, h, n] & (columns[b, n] == c))[0].tolist() == list(kept)
        assert not taken[b, h, n][columns[b, n] < 0].any()
    rows = np.split(csr.indices, csr.indptr[1:-1])
    assert all((np.diff(row) > 0).all() for row in rows) and csr.indptr[-1] == len(csr.indices) == taken.sum()


def test_the_transpose_is_that_of_the_matrix_and_turns_back():
    csr = random_csr(2, 3, 5, 7)
    indptr, rows, order = transpose_pattern(csr)
    back = type(csr)(indptr, rows, (2, 3, 7, 5))
    np.testing.assert_array_equal(dense(back), dense(csr).swapaxes(-1, -2))
    again = transpose_pattern(back)
    np.testing.assert_array_equal(again[0], csr.indptr)
    np.testing.assert_array_equal(again[1], csr.indices)
    np.testing.assert_array_equal(order[again[2]], np.arange(len(csr.indices)))


# Sparse attention


@pytest.mark.parametrize("kind", PATTERNS)
def test_sparse_attention_by_loops(kind):
    q, k, v, dout, _ = problem()
    pattern, scale = pattern_of(kind), np.random.default_rng(2).normal(size=dout.shape[:3])
    out, lse = sparse_attention(q, k, v, pattern, scale=0.7, row_scale=scale, return_lse=True)
    numerator, total = np.zeros(dout.shape), np.zeros(dout.shape[:3])
    for b, h, n, m, log_weight in zip(*entries(pattern, 4), strict=True):
        weight = math.exp(0.7 * q[b, h, n] @ k[b, h // 2, m] + log_weight)
        numerator[b, h, n] += weight * v[b, h // 2, m]
        total[b, h, n] += weight
    assert (total == 0).any() and (total > 0).any()
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total), atol=1e-12)
    expected = scale[..., None] * numerator / np.where(total > 0, total, 1)[..., None]
    np.testing.assert_allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("kind", PATTERNS)
def test_sparse_attention_gradients(kind):
    q, k, v, dout, _ = problem(seed=1)
    rng, pattern = np.random.default_rng(3), pattern_of(kind)
    dlse, scale = rng.normal(size=dout.shape[:3]), rng.normal(size=dout.shape[:3])
    gradients = sparse_attention_bwd(dout, q, k, v, pattern, row_scale=scale, dlse=dlse)
    forward = lambda: sparse_attention(q, k, v, pattern, row_scale=scale, return_lse=True)  # noqa: E731
    assert_gradients(forward, gradients, [q, k, v, scale], (dout, dlse), 1e-6)


def test_every_key_is_softmax_attention():
    q, k, v, dout, _ = problem(seed=4)
    full = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 1, 5, 7))
    expected = softmax_attention(q, k, v, return_lse=True)
    for got, exact in zip(sparse_attention(q, k, v, full, return_lse=True), expected, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-14)
    twice = np.concatenate([full, full], axis=-1), np.full((2, 1, 5, 14), -math.log(2))
    np.testing.assert_allclose(sparse_attention(q, k, v, twice), expected[0], atol=1e-14)


def test_sparse_attention_agrees_with_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v, dout, _ = problem(seed=5, heads_kv=4)
    pattern = random_csr(2, 4, 5, 7, 0.6)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    scores = (leaves[0] @ leaves[1].mT / 3**0.5).masked_fill(~torch.tensor(dense(pattern)), -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num(0) @ leaves[2]
    np.testing.assert_allclose(sparse_attention(q, k, v, pattern), out.detach(), atol=1e-13)
    filled = dense(pattern).any(axis=-1)  # autograd of an empty row is NaN
    rows = np.where(filled[..., None], dout, 0)
    scores = (leaves[0] @ leaves[1].mT / 3**0.5).masked_fill(~torch.tensor(dense(pattern) | ~filled[..., None]), -1e300)
    (torch.softmax(scores, -1) @ leaves[2]).backward(torch.tensor(rows))
    for gradient, leaf in zip(sparse_attention_bwd(rows, q, k, v, pattern), leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=1e-12)


# Contexts, columns and keys


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seq_q, state", [(7, False), (4, True), (10, True), (10, False)])
def test_running_mean_by_loops(masked, seq_q, state):
    _, _, v, dout, keywords = problem(seq_q=7, masked=masked, heads=2)
    mask = keywords.get("key_mask")
    rng = np.random.default_rng(2)
    before = (rng.normal(size=(2, 2, 4)), np.array([3, 0], np.int32)) if state else None
    if state:
        before[0][1] = 0
    out, after = running_mean(v, num_queries=seq_q, key_mask=mask, state=before, return_state=True)
    for b, h, n in np.ndindex(2, 2, seq_q):
        kept = [v[b, h, m] for m in range(7) if m <= n + 7 - seq_q and (mask is None or mask[b, m])]
        total = sum(kept, before[0][b, h] if state else np.zeros(4))
        count = len(kept) + (before[1][b] if state else 0)
        np.testing.assert_allclose(out[b, h, n], total / max(count, 1), atol=1e-13)
    np.testing.assert_allclose(after[0] / np.maximum(after[1], 1)[:, None, None], out[:, :, -1], atol=1e-13)
    dout = rng.normal(size=out.shape)
    dv = running_mean_bwd(dout, v, num_queries=seq_q, key_mask=mask, state=before)
    assert_gradients(lambda: running_mean(v, num_queries=seq_q, key_mask=mask, state=before), (dv,), [v], (dout,))


@pytest.mark.parametrize("masked", [False, True])
def test_block_pool_by_loops_and_its_gradients(masked):
    _, _, v, _, keywords = problem(seq_k=9, heads=2, masked=masked)
    del keywords["is_causal"]
    probs = np.random.default_rng(0).random((2, 2, 5, 4))
    out, expected = block_pool(v, probs, **keywords), np.zeros((2, 2, 1, 4))
    for b, h in np.ndindex(2, 2):
        keys = [m for m in range(9) if not masked or keywords["key_mask"][b, m]]
        queries = [n for n in range(5) if not masked or keywords["query_mask"][b, n]]
        for n in queries:
            for r, m in enumerate(keys):
                expected[b, h, 0] += probs[b, h, n, column(r, len(keys), 4)] * v[b, h, m] / len(queries)
    np.testing.assert_allclose(out, expected, atol=1e-13)
    dout = np.random.default_rng(1).normal(size=out.shape)
    gradients = block_pool_bwd(dout, v, probs, **keywords)
    assert_gradients(lambda: block_pool(v, probs, **keywords), gradients, [v, probs], (dout,))


def test_the_pool_weighs_tokens_by_their_number_over_that_of_columns():
    probs = probabilities(1, 2, 5, 4).astype(np.float64)
    probs /= probs.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(block_pool(np.ones((1, 2, 12, 3)), probs), np.full((1, 2, 1, 3), 12 / 4), atol=1e-13)


@pytest.mark.parametrize("masked, causal", VISIBILITIES)
def test_expand_values_and_block_sum_are_adjoint(masked, causal):
    keywords, rng = masks(3, 6, 11, masked, causal), np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2, 6, 5)), rng.normal(size=(3, 2, 6, 11))
    wide, sums = expand_values(x, 11, **keywords), block_sum(y, 5, **keywords)
    np.testing.assert_allclose((wide * y).sum(), (x * sums).sum(), atol=1e-12)
    columns = key_columns(3, 6, 11, 5, **keywords)
    for b, h, n, m in np.ndindex(wide.shape):
        assert wide[b, h, n, m] == (x[b, h, n, columns[b, n, m]] if columns[b, n, m] >= 0 else 0)


# Losses


@pytest.mark.parametrize("masked, causal", VISIBILITIES)
def test_teacher_blocks_give_the_losses_of_an_estimate(masked, causal):
    """KL and the squared error of softmax(expanded scores) against the teacher, from masses alone."""
    q, k, _, _, keywords = problem(seq_k=9, masked=masked, causal=causal, heads_kv=4)
    scores = np.random.default_rng(1).normal(size=(2, 4, 5, 4))
    masses, squares, plogp = teacher_blocks(q, k, 4, scale=0.8, **keywords)
    wide = expand_values(scores, 9, **keywords)
    widths = block_sum(np.ones((2, 4, 5, 9)), 4, **keywords)
    seen_rows = widths.sum(axis=-1) > 0
    with np.errstate(divide="ignore"):
        total = np.log((widths * np.exp(scores)).sum(axis=-1))
    for b, h, n in np.ndindex(2, 4, 5):
        if not seen_rows[b, h, n]:
            assert (masses[b, h, n] == 0).all() and squares[b, h, n] == plogp[b, h, n] == 0
            continue
        keys = [m for m in range(9) if sees(b, n, m, 5, 9, **keywords)]
        p = np.exp(0.8 * k[b, h, keys] @ q[b, h, n])
        p /= p.sum()
        estimate = np.exp(wide[b, h, n, keys])
        estimate /= estimate.sum()
        e = np.exp(scores[b, h, n] - total[b, h, n])
        kl = plogp[b, h, n] - masses[b, h, n] @ scores[b, h, n] + total[b, h, n]
        sse = squares[b, h, n] - 2 * e @ masses[b, h, n] + widths[b, h, n] @ e**2
        np.testing.assert_allclose(
            (kl, sse), ((p * np.log(p / estimate)).sum(), ((p - estimate) ** 2).sum()), atol=1e-12
        )


@pytest.mark.parametrize("masked, causal", VISIBILITIES)
def test_attention_divergence_and_its_gradients(masked, causal):
    q, k, _, _, keywords = problem(masked=masked, causal=causal)
    qt, kt, *_ = problem(seed=1, dim=4, heads_kv=4)
    kl, sse = attention_divergence(q, k, qt, kt, scale=0.9, **keywords)
    assert (kl >= 0).all() and (sse >= 0).all() and kl.max() > 0.1
    for b, h, n in np.ndindex(kl.shape):
        keys = [m for m in range(7) if sees(b, n, m, 5, 7, **keywords)]
        ps, pt = np.exp(0.9 * k[b, h // 2, keys] @ q[b, h, n]), np.exp(0.5 * kt[b, h, keys] @ qt[b, h, n])
        ps, pt = ps / ps.sum(), pt / pt.sum()
        np.testing.assert_allclose(kl[b, h, n], (pt * np.log(pt / ps)).sum(), atol=1e-12)
        np.testing.assert_allclose(sse[b, h, n], ((pt - ps) ** 2).sum(), atol=1e-12)
    rng = np.random.default_rng(2)
    dkl, dsse = rng.normal(size=kl.shape), rng.normal(size=kl.shape)
    gradients = attention_divergence_bwd(dkl, dsse, q, k, qt, kt, scale=0.9, **keywords)
    forward = lambda: attention_divergence(q, k, qt, kt, scale=0.9, **keywords)  # noqa: E731
    assert_gradients(forward, gradients, [q, k], (dkl, dsse), 1e-6)
    same = attention_divergence(q, k, q, k, **keywords)
    np.testing.assert_allclose(same, 0 * np.array(same), atol=1e-14)
