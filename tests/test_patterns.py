"""CsrPattern and BlockPattern as objects: to and from other libraries, shapes, copies, what they print."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

import subquad
from ref.expand_blocks import expand_blocks
from sparse_cases import dense, masks, public, random_blocks, random_csr

SHAPE = (2, 3, 7, 11)


def csr(weighted=False, **keywords):
    return random_csr(*SHAPE, weighted=weighted, **keywords)


def blocks(masked=True):
    return random_blocks(*SHAPE, 5, 2, **masks(2, 7, 11, masked))


def matrix_of(pattern):
    """[B H N, M] of weights, from the entries one by one."""
    out = np.zeros((np.prod(pattern.shape[:3]), pattern.shape[3]), np.float32)
    weights = np.ones(len(pattern.indices)) if pattern.log_weights is None else np.exp(pattern.log_weights)
    for row, (low, high) in enumerate(zip(pattern.indptr[:-1], pattern.indptr[1:], strict=True)):
        out[row, pattern.indices[low:high]] = weights[low:high]
    return out


# To other libraries


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("weighted", [False, True])
def test_to_scipy(weighted, index):
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    exact = csr(weighted, index=index)
    matrix = public(exact).to_scipy()
    assert isinstance(matrix, sparse.csr_array) and matrix.dtype == np.float32
    assert matrix.shape == (42, 11) and matrix.nnz == len(exact.indices) and matrix.has_canonical_format
    np.testing.assert_array_equal(matrix.toarray(), matrix_of(exact))
    values = np.arange(1, len(exact.indices) + 1, dtype=np.float32)
    given = public(exact).to_scipy(values)
    np.testing.assert_array_equal(given.data, values)
    np.testing.assert_array_equal(given.toarray() != 0, dense(exact).reshape(42, 11))


@pytest.mark.parametrize("weighted", [False, True])
def test_to_torch(weighted):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    exact = csr(weighted)
    for pattern in (public(exact), public(exact, torch.from_numpy)):
        tensor = pattern.to_torch()
        assert tensor.layout == torch.sparse_csr and tensor.dtype == torch.float32 and tuple(tensor.shape) == (42, 11)
        np.testing.assert_array_equal(tensor.to_dense().numpy(), matrix_of(exact))
        values = torch.arange(1.0, 1 + len(exact.indices))
        np.testing.assert_array_equal(pattern.to_torch(values).values().numpy(), values.numpy())


def test_to_cupy():
    pytest.importorskip("cupy", reason="cupy is not installed")
    exact = csr(True)
    np.testing.assert_array_equal(public(exact).to_cupy().toarray().get(), matrix_of(exact))


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_the_same_matrix(masked):
    pytest.importorskip("scipy", reason="scipy is not installed")
    pattern = blocks(masked)
    np.testing.assert_array_equal(public(pattern).to_scipy().toarray(), matrix_of(expand_blocks(pattern)))
    assert public(pattern).shape == SHAPE and public(pattern).to_csr().shape == SHAPE
    assert public(csr()).to_csr().indices.shape == csr().indices.shape


def test_probabilities_of_a_pattern_as_values():
    """The probabilities of the entries as a matrix: its product with v is the output."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    pattern, rng = public(csr()), np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*SHAPE[:2], n, 4)).astype(np.float32) for n in (7, 11, 11))
    out, lse = subquad.sparse_attention(q, k, v, pattern, return_lse=True)
    rows = np.repeat(np.arange(42), np.diff(pattern.indptr))
    b, h, n = np.unravel_index(rows, SHAPE[:3])
    logits = 0.5 * (q[b, h, n] * k[b, h, pattern.indices]).sum(axis=-1)
    probs = pattern.to_scipy(np.exp(logits - lse[b, h, n]))
    product = np.stack([probs[7 * i : 7 * i + 7] @ v[i // 3, i % 3] for i in range(6)])
    np.testing.assert_allclose(product.reshape(out.shape), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["to_scipy", "to_torch"])
def test_values_are_one_per_entry(way):
    pytest.importorskip(way[3:], reason=f"{way[3:]} is not installed")
    for values in (np.ones(3, np.float32), np.ones((2, 2), np.float32), [1.0]):
        with pytest.raises(ValueError, match=r"^\[CsrPattern\] values: expected shape \[nnz\] = \[\d+\], got \["):
            getattr(public(csr()), way)(values)


# From other libraries


@pytest.mark.parametrize("kind", ["csr_array", "csr_matrix"])
@pytest.mark.parametrize("weighted", [False, True])
def test_from_scipy(kind, weighted):
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    exact = csr(weighted)
    matrix = getattr(sparse, kind)(public(exact).to_scipy())
    matrix.indices = matrix.indices.astype(np.int64)
    back = subquad.CsrPattern.from_scipy(matrix, SHAPE)
    same(back, exact)


@pytest.mark.parametrize("weighted", [False, True])
def test_from_torch(weighted):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    exact = csr(weighted)
    back = subquad.CsrPattern.from_torch(public(exact).to_torch().double().requires_grad_(), SHAPE)
    assert isinstance(back.indices, torch.Tensor) and back.indices.dtype == torch.int32
    same(replace(back, **{name: x.numpy() for name, x in arrays_of(back).items()}), exact)


def test_from_cupy():
    pytest.importorskip("cupy", reason="cupy is not installed")
    exact = csr(True)
    back = subquad.CsrPattern.from_cupy(public(exact).to_cupy(), SHAPE)
    same(replace(back, **{name: x.get() for name, x in arrays_of(back).items()}), exact)


def arrays_of(pattern):
    return {name: x for name, x in vars(pattern).items() if hasattr(x, "dtype")}


def same(got, exact):
    assert got.shape == exact.shape and got.indices.dtype == np.int32
    np.testing.assert_array_equal(got.indptr, exact.indptr)
    np.testing.assert_array_equal(got.indices, exact.indices)
    assert (got.log_weights is None) == (exact.log_weights is None)
    if exact.log_weights is not None:
        assert got.log_weights.dtype == np.float32
        np.testing.assert_allclose(got.log_weights, exact.log_weights, rtol=1e-5, atol=1e-6)


def test_what_from_scipy_refuses():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    matrix, make = public(csr()).to_scipy(), subquad.CsrPattern.from_scipy
    for shape in ((2, 3, 7, 10), (2, 3, 8, 11), (42, 11), None, (2, 3, 7, -11), (2.0, 3, 7, 11)):
        with pytest.raises(ValueError, match=r"^\[from_scipy\] shape: expected \(B, H, N, M\) with B \* H \* N, M = "):
            make(matrix, shape)
    for other in (matrix.tocsc(), matrix.tocoo(), matrix.toarray(), None, sparse.csr_array((42, 11)).todok()):
        with pytest.raises(TypeError, match=r"^\[from_scipy\] matrix: expected .* of format csr, got \w+$"):
            make(other, SHAPE)
    for value in (-1.0, np.nan):
        spoiled = matrix.copy()
        spoiled.data[3] = value
        with pytest.raises(ValueError, match=r"^\[from_scipy\] values: expected numbers of at least 0, .* got a neg"):
            make(spoiled, SHAPE)


def test_what_from_torch_refuses():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor, make = public(csr()).to_torch(), subquad.CsrPattern.from_torch
    with pytest.raises(ValueError, match=r"^\[from_torch\] shape: expected \(B, H, N, M\) with .* = \(42, 11\), got"):
        make(tensor, (2, 3, 11, 7))
    for other in (tensor.to_dense(), tensor.to_sparse_coo(), torch.ones(3), np.ones(3), None):
        with pytest.raises(TypeError, match=r"^\[from_torch\] tensor: expected one of layout torch\.sparse_csr, got"):
            make(other, SHAPE)


def test_matrices_not_in_canonical_form_are_refused_where_they_are_used():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    q, k = np.ones((1, 1, 2, 3), np.float32), np.ones((1, 1, 4, 3), np.float32)
    starts = np.array([0, 2, 3])
    for keys, words in (([2, 1, 0], "1 after 2"), ([1, 1, 0], "1 after 1")):
        matrix = sparse.csr_array((np.ones(3, np.float32), np.array(keys), starts), shape=(2, 4))
        pattern = subquad.CsrPattern.from_scipy(matrix, (1, 1, 2, 4))
        message = rf"^\[\w+\] indices: expected keys that ascend inside a row, got {words} at \[1\]$"
        for call in (lambda p=pattern: subquad.sparse_attention(q, k, k, p),
                     lambda p=pattern: subquad.transpose_pattern(p)):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                call()
        matrix.sum_duplicates()  # which sorts too
        subquad.sparse_attention(q, k, k, subquad.CsrPattern.from_scipy(matrix, (1, 1, 2, 4)))


def test_stored_zeros_are_entries_of_weight_0():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    matrix = sparse.csr_array((np.array([0, 2, 0], np.float32), np.array([0, 3, 1]), np.array([0, 2, 3])), shape=(2, 4))
    pattern = subquad.CsrPattern.from_scipy(matrix, (1, 1, 2, 4))
    np.testing.assert_allclose(pattern.log_weights, [-np.inf, np.log(2), -np.inf], rtol=1e-6)
    v = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1)
    out, lse = subquad.sparse_attention(np.ones((1, 1, 2, 1), np.float32), 0 * v, v, pattern, return_lse=True)
    np.testing.assert_allclose(out.ravel(), [3, 0])
    np.testing.assert_allclose(lse.ravel(), [np.log(2), -np.inf], rtol=1e-6)


# The objects


def test_shapes():
    assert public(csr()).matrix_shape == (42, 11)
    assert subquad.CsrPattern(None, None, [np.int64(1), 2, 3, 4]).shape == (1, 2, 3, 4)
    exact = public(blocks(masked=False))
    assert replace(exact, num_keys=None).shape == SHAPE
    assert replace(exact, num_keys=20).shape == (*SHAPE[:3], 20)
    assert replace(exact, num_keys=None, visible=exact.visible // 2).shape == (*SHAPE[:3], 5)
    assert replace(public(blocks()), num_keys=None).shape == SHAPE
    empty = subquad.BlockPattern(np.zeros((0, 3, 7, 1), np.uint8), 5, np.zeros((0, 7), np.int32), 2)
    assert empty.shape == (0, 3, 7, 0) and empty.to_csr().shape == (0, 3, 7, 0)


@pytest.mark.parametrize("make", [csr, lambda: csr(True), blocks, lambda: blocks(False)])
def test_printing_copying_and_pickling(make):
    pattern = public(make())
    text = repr(pattern)
    assert text.startswith(f"{type(pattern).__name__}(") and len(text) < 200 and "\n" not in text
    assert str(pattern) == text and f"{next(iter(vars(pattern)))}=" in text
    for twin in (copy.copy(pattern), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern)), replace(pattern)):
        assert type(twin) is type(pattern) and repr(twin) == text and twin != pattern and pattern == pattern
        for name, value in vars(pattern).items():
            np.testing.assert_array_equal(getattr(twin, name), value)
    with pytest.raises(FrozenInstanceError):
        pattern.shape = (1, 2, 3, 4)
    assert len({pattern, copy.copy(pattern)}) == 2  # by identity, as arrays are not compared


def test_what_is_printed():
    pattern = subquad.CsrPattern(np.zeros(7, np.int64), np.zeros(0, np.int32), (1, 2, 3, 4))
    assert repr(pattern) == "CsrPattern(indptr=int64[7], indices=int32[0], shape=(1, 2, 3, 4), log_weights=None)"
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert "indptr=int64[7]" in repr(replace(pattern, indptr=torch.zeros(7, dtype=torch.int64)))
