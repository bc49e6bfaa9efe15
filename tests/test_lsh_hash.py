"""Bucket codes against the reference, bit for bit where the contract says so."""

import numpy as np
import pytest

import subquad
from cases import DTYPES, as_dtype, strided
from ref import lsh_hash as ref

SHAPES = [(2, 4, 37, 16), (1, 2, 1, 1), (1, 1, 70, 3), (2, 2, 16, 33), (1, 2, 33, 64), (1, 1, 20, 65), (1, 1, 9, 512)]


def tokens(shape, seed=0, dtype="float32"):
    return as_dtype(np.random.default_rng(seed).standard_normal(shape), dtype)


def skip_too_wide(dim, isa):
    if isa.startswith("cuda") and dim > 256:
        pytest.skip("CUDA kernels take head dimensions up to 256")


def codes_of(codes, bits):
    assert codes.dtype == (np.uint16 if bits <= 16 else np.int32)
    return codes.astype(np.int64)


# Matches the reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("hashes", "bits"), [(1, 1), (5, 7), (16, 8), (3, 16), (2, 17), (2, 24), (70, 9)])
@pytest.mark.parametrize("carving", ["strided", "published"])
@pytest.mark.backends
def test_hadamard_codes_are_bit_equal(shape, hashes, bits, carving, isa):
    skip_too_wide(shape[3], isa)
    x = tokens(shape)
    signs = ref.draw_signs(shape[1], hashes, bits, shape[3], carving, seed=5).astype(np.float32)
    codes = subquad.lsh_hash(x, signs=signs, num_hashes=hashes, hash_bits=bits, carving=carving)
    expected = ref.lsh_hash_hadamard(x, signs, hashes, bits, carving, dtype=np.float32)
    np.testing.assert_array_equal(codes_of(codes, bits), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("hashes", "bits"), [(1, 1), (5, 7), (16, 8), (3, 18)])
@pytest.mark.backends
def test_gaussian_codes_are_equal_outside_the_stated_margin(shape, hashes, bits, isa):
    skip_too_wide(shape[3], isa)
    x = tokens(shape)
    planes = np.random.default_rng(1).standard_normal((shape[1], hashes, bits, shape[3])).astype(np.float32)
    codes = codes_of(subquad.lsh_hash(x, planes), bits)
    y = ref.plane_projections(x.astype(np.float64), planes.astype(np.float64))  # [B, H, R, N, J]
    lengths = np.linalg.norm(x, axis=-1)[:, :, None, :, None] * np.linalg.norm(planes, axis=-1)[None, :, :, None, :]
    sure = np.abs(y) > shape[3] * 2.0**-23 * lengths
    got = (codes[..., None] >> np.arange(bits)) & 1
    assert (got[sure] == (y > 0)[sure]).all()
    assert sure.mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_framework(dtype, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    x = tokens((2, 2, 19, 24), dtype=dtype)
    signs = ref.draw_signs(1, 6, 8, 24, "strided", seed=5).astype(np.float32)
    codes = subquad.lsh_hash(framework.make(x), signs=framework.make(signs), num_hashes=6, hash_bits=8)
    expected = ref.lsh_hash_hadamard(x.astype(np.float32), signs, 6, 8, "strided", dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(codes).astype(np.int64), expected)


# Edges


@pytest.mark.backends
def test_strides_groups_and_shared_planes(isa):
    x = tokens((2, 6, 21, 20))
    planes = np.random.default_rng(1).standard_normal((2, 4, 5, 20)).astype(np.float32)
    codes = subquad.lsh_hash(x, planes)
    np.testing.assert_array_equal(codes, subquad.lsh_hash(strided(x), strided(planes)))
    np.testing.assert_array_equal(codes[:, 3:], subquad.lsh_hash(x[:, 3:], planes[1]))
    out = np.zeros((2, 6, 4, 30), np.uint16)[..., 4:25]
    assert subquad.lsh_hash(x, planes, out=out) is out
    np.testing.assert_array_equal(out, codes)


@pytest.mark.parametrize("exponent", [-148, -120, -101, -99, 0, 99, 101, 120, 126])
@pytest.mark.backends
def test_codes_do_not_depend_on_the_scale(exponent, isa):
    x = tokens((1, 1, 40, 64)).clip(-1.9, 1.9)
    signs = ref.draw_signs(1, 16, 8, 64, "strided", seed=5).astype(np.float32)
    codes = subquad.lsh_hash(x, signs=signs, num_hashes=16, hash_bits=8)
    scaled = np.ldexp(x, exponent).astype(np.float32)
    again = subquad.lsh_hash(scaled, signs=signs, num_hashes=16, hash_bits=8)
    if exponent > -120:  # below, the input itself loses bits
        np.testing.assert_array_equal(codes, again)
    np.testing.assert_array_equal(
        again.astype(np.int64), ref.lsh_hash_hadamard(scaled, signs, 16, 8, "strided", dtype=np.float32)
    )


@pytest.mark.backends
def test_zero_and_nan_rows_have_code_zero(isa):
    x = tokens((1, 1, 5, 64))
    x[0, 0, 1] = 0
    x[0, 0, 3, 7] = np.nan
    signs = ref.draw_signs(1, 9, 8, 64, "strided", seed=5).astype(np.float32)
    planes = np.random.default_rng(1).standard_normal((9, 8, 64)).astype(np.float32)
    for codes in (subquad.lsh_hash(x, signs=signs, num_hashes=9, hash_bits=8), subquad.lsh_hash(x, planes)):
        assert (codes[..., [1, 3]] == 0).all() and (codes[..., [0, 2, 4]] != 0).any()


def test_empty_axes():
    planes = np.ones((2, 4, 5, 20), np.float32)
    for shape in ((0, 2, 3, 20), (2, 2, 0, 20)):
        assert subquad.lsh_hash(np.ones(shape, np.float32), planes).shape == (shape[0], 2, 4, shape[2])


# Laws


@pytest.mark.statistical
@pytest.mark.parametrize(("carving", "low", "high"), [("strided", 0.94, 1.05), ("published", 0.85, 0.96)])
def test_collision_rates_of_hadamard_hashing(carving, low, high):
    """At cosine 0.5, 64 dimensions, 9 bits: the rate over 400 seeds x 32 hashes x 8 pairs against u^9 = 0.0260; the
    bands are the measured bias of the scheme +- 4 standard errors. The published carving is biased."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 8, 64))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b -= (a * b).sum(1, keepdims=True) * a
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    pair = np.stack([a, 0.5 * a + np.sqrt(0.75) * b])[None].astype(np.float32)  # [1, 2, 8, 64]
    hits = []
    for seed in range(400):
        signs = ref.draw_signs(1, 32, 9, 64, carving, seed=seed).astype(np.float32)
        codes = subquad.lsh_hash(pair, signs=signs, num_hashes=32, hash_bits=9, carving=carving)
        hits.append((codes[0, 0] == codes[0, 1]).mean())
    ratio = np.mean(hits) / (1 - np.arccos(0.5) / np.pi) ** 9
    assert low < ratio < high


@pytest.mark.statistical
def test_collision_rates_of_gaussian_hashing():
    """4 angles, 3000 hashes of 3 bits: |z| <= 4.5, a false alarm rate below 1e-4."""
    cosines = np.array([-0.5, 0.0, 0.5, 0.9])
    x = np.zeros((1, 1, 5, 8), np.float32)
    x[0, 0, 0, 0] = 1
    x[0, 0, 1:, 0], x[0, 0, 1:, 1] = cosines, np.sqrt(1 - cosines**2)
    codes = subquad.lsh_hash(x, subquad.random_normal((3000, 3, 8), seed=1))[0, 0]
    p = (1 - np.arccos(cosines) / np.pi) ** 3
    rate = (codes[:, 1:] == codes[:, :1]).mean(0)
    assert (np.abs(rate - p) <= 4.5 * np.sqrt(p * (1 - p) / 3000)).all()
