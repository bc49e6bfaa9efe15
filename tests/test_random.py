"""Random arrays: published vectors, the keying of the counter, and the distributions."""

import numpy as np
import pytest

import subquad
from ref import philox

SHAPES = [(), (1,), (5,), (3, 7), (2, 3, 5), (2, 3, 4, 9), (1, 1, 300, 33), (0, 4), (2, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 17, -5])
@pytest.mark.backends
def test_uniform_and_signs_are_the_reference_bits(shape, seed, isa):
    np.testing.assert_array_equal(
        subquad.random_uniform(shape, seed=seed, stream=16), philox.random_uniform(shape, seed, 16).astype(np.float32)
    )
    np.testing.assert_array_equal(
        subquad.random_signs(shape, seed=seed, stream=2), philox.random_signs(shape, seed, 2).astype(np.float32)
    )


@pytest.mark.backends
def test_normals_are_close_to_box_muller_and_equal_on_every_row(isa):
    shape = (2, 400, 67)
    normal = subquad.random_normal(shape, seed=7)
    exact = philox.random_normal(shape, 7)
    assert (np.abs(normal - exact) <= 4e-7 * np.maximum(1, np.abs(exact))).all()
    if isa == "cuda":
        return
    subquad.cpu.set_isa(subquad.cpu.available()[0])
    np.testing.assert_array_equal(normal, subquad.random_normal(shape, seed=7))
    subquad.cpu.set_isa(isa)


def test_a_batch_item_is_the_array_alone():
    whole = subquad.random_normal((2, 3, 10, 8), seed=3)
    np.testing.assert_array_equal(whole[0], subquad.random_normal((3, 10, 8), seed=3))
    np.testing.assert_array_equal(whole[0, 0, :4], subquad.random_normal((4, 8), seed=3))


@pytest.mark.statistical
def test_moments():
    """One million draws: each bound is 5 standard errors, a false alarm rate below 1e-6."""
    n = 1_000_000
    uniform = subquad.random_uniform((1000, 1000), seed=1).astype(np.float64)
    assert abs(uniform.mean() - 0.5) < 5 * np.sqrt(1 / 12 / n) and 0 <= uniform.min() and uniform.max() < 1
    normal = subquad.random_normal((1000, 1000), seed=1).astype(np.float64)
    assert abs(normal.mean()) < 5 / np.sqrt(n)
    assert abs((normal**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((normal**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert abs((normal[:, :-1] * normal[:, 1:]).mean()) < 5 / np.sqrt(n)
    assert abs(subquad.random_signs((1000, 1000), seed=1).mean()) < 5 / np.sqrt(n)


def test_out_decides_the_framework():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    out = torch.empty(4, 6)
    assert subquad.random_normal((4, 6), seed=2, out=out) is out
    np.testing.assert_array_equal(out.numpy(), subquad.random_normal((4, 6), seed=2))
