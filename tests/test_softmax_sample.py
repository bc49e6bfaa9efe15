"""Drawn keys: the same as the reference's away from boundaries, and with softmax frequencies."""

import numpy as np
import pytest

import subquad
from budgets import within
from cases import DTYPES, as_dtype, strided
from ref import softmax_sample as ref
from ref.softmax_attention import softmax_attention

SHAPES = {  # B, H, Hkv, N, M, D
    "plain": (2, 2, 2, 20, 40, 16),
    "grouped": (2, 6, 2, 7, 64, 33),
    "blocks": (1, 2, 1, 9, 200, 8),
    "tiny": (1, 1, 1, 1, 1, 1),
    "edge": (1, 1, 1, 5, 65, 64),
}


def tokens(name, masked, dtype="float32"):
    rng = np.random.default_rng(0)
    batch, heads, heads_kv, seq_q, seq_k, dim = SHAPES[name]
    q, k = rng.standard_normal((batch, heads, seq_q, dim)), rng.standard_normal((batch, heads_kv, seq_k, dim))
    if not masked:
        return as_dtype(q, dtype), as_dtype(k, dtype), {}
    mask = rng.random((batch, seq_k)) < 0.6
    mask[-1, : seq_k // 2] = False
    k[np.broadcast_to(~mask[:, None], k.shape[:3])] = np.nan
    return as_dtype(q, dtype), as_dtype(k, dtype), dict(key_mask=mask)


def assert_equal_draws(got, q, k, keywords):
    """Weights are float32: a uniform within 1e-5 of a boundary may fall on either side; few do."""
    indices, margin = ref.softmax_sample(q, k, return_margin=True, **keywords)
    assert got.dtype == np.int32 and got.shape == indices.shape
    sure = margin > 1e-5
    np.testing.assert_array_equal(got[sure], indices[sure])
    assert sure.mean() > 0.98 or (~sure).sum() <= 1
    limits = got >= 0
    assert (limits == (indices >= 0)).all() and (got < max(k.shape[2], 1)).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_matches_the_reference(name, masked, seed, isa):
    q, k, keywords = tokens(name, masked)
    keywords |= dict(num_samples=3, scale=0.7, seed=seed)
    got = subquad.softmax_sample(q, k, **keywords)
    assert_equal_draws(got, q, k, keywords)
    np.testing.assert_array_equal(subquad.softmax_sample(strided(q), strided(k), **keywords), got)
    if masked:
        kept = np.take_along_axis(keywords["key_mask"][:, None, None], np.maximum(got, 0), axis=-1)
        assert (kept | (got < 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    q, k, keywords = tokens("blocks", True, dtype)
    (got,) = within(framework, subquad.softmax_sample, (q, k), keywords | dict(seed=4))
    assert_equal_draws(got, q.astype(np.float64), k.astype(np.float64), keywords | dict(seed=4))


def test_draws_do_not_depend_on_the_batch(isa):
    q, k, keywords = tokens("plain", True)
    got = subquad.softmax_sample(q, k, seed=3, num_samples=2, **keywords)
    alone = subquad.softmax_sample(q[1:], k[1:], seed=3, num_samples=2, key_mask=keywords["key_mask"][1:])
    np.testing.assert_array_equal(alone, got[1:])
    same = subquad.softmax_sample(np.repeat(q[:1], 2, 0), np.repeat(k[:1], 2, 0), seed=3)
    if np.isfinite(k[:1]).all():
        np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(subquad.softmax_sample(q, k, seed=np.array(3), num_samples=2, **keywords), got)
    assert not np.array_equal(subquad.softmax_sample(q, k, seed=4, num_samples=2, **keywords), got)


def test_no_key(isa):
    q, k, _ = tokens("plain", False)
    none = subquad.softmax_sample(q, np.full_like(k, np.nan), key_mask=np.zeros((2, 40), bool))
    assert (none == -1).all()
    assert (subquad.softmax_sample(q, k[:, :, :0]) == -1).all()
    assert subquad.softmax_sample(q[:, :, :0], k).shape == (2, 2, 1, 0)
    for bad in (0, -1, 1.5, True):
        with pytest.raises((ValueError, TypeError), match=r"^\[softmax_sample\] num_samples: "):
            subquad.softmax_sample(q, k, num_samples=bad)


@pytest.mark.statistical
def test_frequencies_are_softmax_probabilities():
    """20000 draws for 3 queries over 150 keys in 3 blocks: |z| <= 5 for each of 450 counts."""
    rng, draws = np.random.default_rng(6), 20000
    q, k = rng.standard_normal((1, 1, 3, 4)).astype(np.float32), rng.standard_normal((1, 1, 150, 4)).astype(np.float32)
    indices = subquad.softmax_sample(q, 2 * k, num_samples=draws, seed=3)
    p = softmax_attention(q, 2 * k, np.eye(150)[None, None])[0, 0]
    for n in range(3):
        counts = np.bincount(indices[0, 0, :, n], minlength=150)
        assert (np.abs(counts - draws * p[n]) <= 5 * np.sqrt(draws * p[n] * (1 - p[n])) + 1).all()
    first, second = indices[0, 0, ::2, 0], indices[0, 0, 1::2, 0]  # samples are drawn independently
    same, expected = (first == second).mean(), (p[0] ** 2).sum()
    assert abs(same - expected) <= 5 * np.sqrt(expected / (draws / 2))
