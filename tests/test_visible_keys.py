"""Counts and places of visible keys against their reference."""

import numpy as np
import pytest

import subquad
from ref import visible_keys as ref
from sparse_cases import masks

SIZES = [(3, 6, 11), (2, 11, 6), (1, 1, 1), (2, 1, 40), (3, 70, 70), (1, 5, 300)]


@pytest.mark.parametrize("batch, seq_q, seq_k", SIZES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_the_reference(batch, seq_q, seq_k, masked, causal, isa):
    given = masks(batch, seq_q, seq_k, masked, causal)
    sizes = dict(batch=batch, num_queries=seq_q, num_keys=seq_k)
    for keywords in (given, given | dict(key_mask=None), given | dict(query_mask=None)):
        got = subquad.visible_keys(**keywords, **sizes)
        for actual, expected in zip(got, ref.visible_keys(**keywords, **sizes), strict=True):
            assert actual.dtype == np.int32
            np.testing.assert_array_equal(actual, expected)


def test_every_framework(framework):
    keywords = masks(3, 6, 11, causal=True)
    made = {name: framework.make(x) if name.endswith("mask") else x for name, x in keywords.items()}
    got = subquad.visible_keys(**made, batch=3, num_queries=6, num_keys=11)
    expected = ref.visible_keys(**keywords, batch=3, num_queries=6, num_keys=11)
    for actual, exact in zip(got, expected, strict=True):
        np.testing.assert_array_equal(framework.read(actual), exact)


def test_strides(isa):
    mask = masks(3, 5, 22)["key_mask"]
    got = subquad.visible_keys(mask[:, ::2].copy(), batch=3, num_queries=5, num_keys=11)
    wide = np.zeros((3, 50), bool)
    wide[:, :11] = mask[:, ::2]
    view = subquad.visible_keys(wide[:, :11], batch=3, num_queries=5, num_keys=11)
    for a, b in zip(got, view, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing(isa):
    for batch, seq_q, seq_k in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        counts, positions = subquad.visible_keys(batch=batch, num_queries=seq_q, num_keys=seq_k)
        assert counts.shape == (batch, seq_q) and positions.shape == (batch, seq_k) and (counts == seq_k).all()
    none = np.zeros((2, 7), bool)
    counts, positions = subquad.visible_keys(none, batch=2, num_queries=3, num_keys=7, is_causal=True)
    assert (counts == 0).all() and (positions == -1).all()
