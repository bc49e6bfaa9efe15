"""Blocks as CSR: exactly the entries of the reference."""

import numpy as np
import pytest

import subquad
from ref import expand_blocks as ref
from ref.block_map import start
from ref.patterns import unpack
from sparse_cases import dense, masks, probabilities, public, random_blocks

SIZES = [(3, 2, 6, 11, 5), (2, 1, 9, 9, 64), (1, 1, 1, 1, 1), (1, 3, 20, 300, 7), (3, 3, 37, 37, 12)]


def check(blocks):
    got, expected = subquad.expand_blocks(public(blocks)), ref.expand_blocks(blocks)
    assert tuple(got.shape) == tuple(expected.shape) and got.log_weights is None
    for name in ("indptr", "indices"):
        actual, exact = getattr(got, name), getattr(expected, name)
        assert actual.dtype == exact.dtype
        np.testing.assert_array_equal(actual, exact, err_msg=name)
    return got


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_the_reference(size, masked, causal, isa):
    keywords = masks(size[0], size[2], size[3], masked, causal)
    for cap in (1, 3, 1000):
        for density in (0.0, 0.4, 1.0):
            check(random_blocks(*size, cap, density, **keywords))


def test_counts_order_and_the_newest_of_each_block(isa):
    keywords = masks(3, 20, 40, causal=True)
    for cap in (1, 2, 9):
        blocks = random_blocks(3, 2, 20, 40, 6, cap, **keywords)
        csr, selected = check(blocks), unpack(blocks.bits, 6)
        edges = start(np.arange(7), blocks.visible[..., None].astype(np.int64), 6)
        counts = (selected * np.minimum(np.diff(edges, axis=-1), cap)[:, None]).sum(axis=-1)
        np.testing.assert_array_equal(np.diff(csr.indptr), counts.ravel())
        matrix = dense(csr)
        for b, h, n, c in np.argwhere(selected):
            if edges[b, n, c + 1] > edges[b, n, c]:
                assert matrix[b, h, n, blocks.positions[b, edges[b, n, c + 1] - 1]]


def test_no_more_entries_than_the_budget_allows(isa):
    heads, num_columns, top_k = 3, 12, 5
    for keywords in (dict(is_causal=True), masks(2, 37, 37, causal=True)):
        blocks = subquad.select_blocks(probabilities(2, heads, 37, num_columns), top_k=top_k, **keywords)
        entries = np.diff(subquad.expand_blocks(blocks).indptr).reshape(2, heads, 37).sum(axis=1)
        taken = unpack(blocks.bits, num_columns).sum(axis=(1, 3))
        assert (entries <= taken * np.minimum(-(-blocks.visible // num_columns), top_k)).all()


def test_nothing(isa):
    for size in ((0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5)):
        assert len(check(random_blocks(*size, 3)).indices) == 0


def test_the_matrix_in_other_libraries(isa):
    blocks = random_blocks(2, 2, 6, 11, 5, 2, **masks(2, 6, 11))
    exact = dense(ref.expand_blocks(blocks))
    csr = public(blocks).to_csr()
    np.testing.assert_array_equal(dense(csr), exact)
    pytest.importorskip("scipy", reason="scipy is not installed")
    for pattern in (public(blocks), csr):
        np.testing.assert_array_equal(pattern.to_scipy().toarray().reshape(exact.shape) != 0, exact)
    pytest.importorskip("torch", reason="torch is not installed")
    for pattern in (public(blocks), csr):
        np.testing.assert_array_equal(pattern.to_torch().to_dense().numpy().reshape(exact.shape) != 0, exact)


def test_every_framework(framework):
    blocks = random_blocks(3, 2, 6, 11, 5, 2, **masks(3, 6, 11, causal=True))
    got, expected = subquad.expand_blocks(public(blocks, framework.make)), ref.expand_blocks(blocks)
    np.testing.assert_array_equal(framework.read(got.indptr), expected.indptr)
    np.testing.assert_array_equal(framework.read(got.indices), expected.indices)
