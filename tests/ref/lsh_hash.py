"""Bucket codes: sign patterns of random projections, dense or by Hadamard transforms.

    codes[b,h,r,n] = sum_j 2^j [ <x[b,h,n,:], planes[r,j,:]> > 0 ]

Source: Charikar, STOC 2002 (dense); Zeng et al., ICML 2021, the (HD)^3 transform and its carving into codes.
"""

import numpy as np

from .philox import PLANES_STREAM, SIGNS_STREAM, random_normal, random_signs


def padded_dim(dim):
    """The power of two >= max(dim, 64)."""
    return max(64, 1 << (dim - 1).bit_length())


def num_parts(num_hashes, hash_bits, d2, carving):
    """How many Hadamard transforms of d2 coordinates give num_hashes codes."""
    if carving == "strided":
        return -(-num_hashes * hash_bits // d2)
    assert carving == "published"
    return -(-num_hashes // (d2 // hash_bits))


def draw_planes(heads_kv, num_hashes, hash_bits, dim, seed):
    """-> [Hkv, R, J, D] float32: an element of a plane is a number that the kernels hold in float32."""
    planes = random_normal([heads_kv, num_hashes * hash_bits, dim], seed, PLANES_STREAM)
    return planes.reshape(heads_kv, num_hashes, hash_bits, dim).astype(np.float32)


def draw_signs(heads_kv, num_hashes, hash_bits, dim, carving, seed):
    """-> [Hkv, 3, P, D2] of +-1."""
    d2 = padded_dim(dim)
    parts = num_parts(num_hashes, hash_bits, d2, carving)
    return random_signs([heads_kv, 3 * parts, d2], seed, SIGNS_STREAM).reshape(heads_kv, 3, parts, d2)


def for_heads(random, heads, rank):
    """random with `rank` axes, or with a leading axis of Hp heads -> one entry a head: h uses h // (H // Hp)."""
    random = np.asarray(random)
    random = random[None] if random.ndim == rank else random
    return np.repeat(random, heads // random.shape[0], axis=0)


def pack_bits(bits):
    """bits [..., tau] -> int32 codes, bit 0 the lowest."""
    return (bits.astype(np.int32) << np.arange(bits.shape[-1], dtype=np.int32)).sum(axis=-1, dtype=np.int32)


def plane_projections(x, planes, dtype=np.float64):
    """x [B, H, N, D], planes [R, J, D] or [Hp, R, J, D] -> [B, H, R, N, J]."""
    planes = for_heads(planes, x.shape[1], 3).astype(dtype)
    return np.einsum("bhnd,hrjd->bhrnj", np.asarray(x).astype(dtype), planes, optimize=True)


def lsh_hash(x, planes, dtype=np.float64):
    """-> codes [B, H, R, N] int32."""
    return pack_bits(plane_projections(x, planes, dtype) > 0)


def hadamard_transform(x):
    """Sylvester's natural order, not normalised. The order of the butterflies is contract: it fixes every rounding."""
    shape, stride = x.shape, 1
    while stride < shape[-1]:
        x = x.reshape(*shape[:-1], -1, 2, stride)
        a, b = x[..., 0, :], x[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(shape)
        stride *= 2
    return x


def hadamard_projections(x, signs, dtype=np.float64):
    """y_p = H S[2,p] H S[1,p] H S[0,p] x: x [B, H, N, D], signs [3, P, D2] or [Hp, 3, P, D2] -> [B, H, N, P, D2]."""
    signs = for_heads(signs, x.shape[1], 3).astype(dtype)
    padding = signs.shape[-1] - x.shape[-1]
    y = np.pad(np.asarray(x).astype(dtype), [(0, 0)] * 3 + [(0, padding)])[:, :, :, None, :]
    for step in range(3):
        y = hadamard_transform(y * signs[None, :, step, None])
    return y


def within_range(x):
    """Rows outside [2^-100, 2^100] times a power of two: the same codes, but no overflow after three transforms."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    outside = np.isfinite(largest) & ((largest < 2.0**-100) | (largest > 2.0**100))
    return np.ldexp(x, np.where(outside, -np.frexp(largest)[1], 0))


def lsh_hash_hadamard(x, signs, num_hashes, hash_bits, carving, dtype=np.float64):
    """-> codes [B, H, num_hashes, N] int32."""
    y = hadamard_projections(within_range(np.asarray(x).astype(dtype)), signs, dtype)
    parts, d2 = y.shape[-2:]
    assert parts == num_parts(num_hashes, hash_bits, d2, carving)
    h, b = np.arange(num_hashes)[:, None], np.arange(hash_bits)
    if carving == "strided":
        part, coordinate = (h * hash_bits + b) % parts, (h * hash_bits + b) // parts
    else:
        codes_a_part = d2 // hash_bits
        part, coordinate = h // codes_a_part + 0 * b, h % codes_a_part * hash_bits + b
    return pack_bits(y[:, :, :, part, coordinate] > 0).transpose(0, 1, 3, 2)
