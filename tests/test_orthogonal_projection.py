"""Orthogonal projections against their reference, and what makes them orthogonal and normal."""

import math

import numpy as np
import pytest

import subquad
from ref import orthogonal_projection as ref
from tolerance import assert_budget, round_to

KINDS = ["haar", "hadamard", "published"]
SIZES = [(5, 3), (24, 8), (16, 16), (70, 33), (9, 200), (1, 1), (3, 64)]


@pytest.mark.parametrize(("count", "dim"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(count, dim, kind, isa):
    """Rows of a factorisation inherit its condition, so the plain float32 one is asked in eight draws."""
    got, exact, error = [], [], 0
    for seed in (*range(7), 2**40 + 3):
        keywords = dict(seed=seed, heads=2, kind=kind)
        got.append(subquad.orthogonal_projection(count, dim, **keywords))
        exact.append(ref.orthogonal_projection(count, dim, **keywords))
        plain = ref.orthogonal_projection(count, dim, **keywords, dtype=np.float32)
        error = max(error, np.abs(plain - exact[-1]).max())
    exact = np.stack(exact)
    assert_budget(np.stack(got), exact, round_to(exact + error, "float32"), floor=1e-6)


@pytest.mark.parametrize(
    ("kind", "count", "dim"),
    [(kind, *size) for kind in KINDS for size in SIZES if kind != "hadamard" or size[1] & (size[1] - 1) == 0],
)
def test_rows_of_a_block_are_orthogonal(kind, count, dim, isa):
    """Hadamard rows that are cut to D elements are orthogonal on average only."""
    rows = subquad.orthogonal_projection(count, dim, seed=4, heads=3, kind=kind).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / lengths
    for start in range(0, count, dim):
        block = unit[:, start : start + dim]
        gram = block @ block.swapaxes(-1, -2)
        assert np.abs(gram - np.eye(block.shape[1])).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_nothing_but_seed_head_and_index(kind, isa):
    whole = subquad.orthogonal_projection(40, 12, seed=9, heads=4, kind=kind)
    np.testing.assert_array_equal(subquad.orthogonal_projection(40, 12, seed=9, heads=2, kind=kind), whole[:2])
    np.testing.assert_array_equal(subquad.orthogonal_projection(13, 12, seed=9, kind=kind), whole[0, :13])
    assert not np.array_equal(subquad.orthogonal_projection(40, 12, seed=10, kind=kind), whole[0])
    np.testing.assert_array_equal(subquad.orthogonal_projection(40, 12, seed=np.array(9), kind=kind), whole[0])
    before = subquad.cpu.isa()
    subquad.cpu.set_isa(subquad.cpu.available()[0])
    floor = subquad.orthogonal_projection(40, 12, seed=9, heads=4, kind=kind)
    subquad.cpu.set_isa(before)
    np.testing.assert_allclose(whole, floor, atol=3e-5)


def test_out_decides_the_framework():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    out = torch.empty(2, 10, 6)
    assert subquad.orthogonal_projection(10, 6, seed=2, heads=2, out=out) is out
    np.testing.assert_array_equal(out.numpy(), subquad.orthogonal_projection(10, 6, seed=2, heads=2))
    assert subquad.orthogonal_projection(0, 6, seed=2).shape == (0, 6)


@pytest.mark.statistical
def test_only_sign_fixed_rows_are_normal():
    """3000 blocks of 8 rows, the mean of e^{<w, z> - |z|^2 / 2} along +-1 with |z|^2 = 2: 1 within 5 errors for
    haar, off by 20 % for the published rows, within 15 % for hadamard ones."""
    off = {}
    for kind in KINDS:
        rows = subquad.orthogonal_projection(8, 8, seed=1, heads=3000, kind=kind).astype(np.float64)
        for sign in (1, -1):
            means = np.exp(rows @ np.full(8, 0.5 * sign) - 1).mean(axis=1)
            off[kind, sign] = means.mean() - 1
            if kind == "haar":
                assert abs(off[kind, sign]) <= 5 * means.std() / math.sqrt(3000)
        first = rows[:, 0]
        if kind != "published":
            assert (np.abs(first.mean(axis=0)) <= 5 / math.sqrt(3000)).all()
    assert off["published", 1] < -0.2 and off["published", -1] > 0.2
    assert max(abs(off["hadamard", sign]) for sign in (1, -1)) < 0.15


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((2**70, 4), ValueError, "num_features: expected a value below 2^31"),
        ((4, 0), ValueError, "dim: expected a value of at least 1, got 0"),
        ((-1, 4), ValueError, "num_features: expected a value of at least 0, got -1"),
        ((4, 2.0), TypeError, "dim: expected an integer, got float"),
    ],
)
def test_bad_shapes(shape, error, message):
    with pytest.raises(error) as caught:
        subquad.orthogonal_projection(*shape, seed=0)
    assert str(caught.value).startswith("[orthogonal_projection] ") and message in str(caught.value)
