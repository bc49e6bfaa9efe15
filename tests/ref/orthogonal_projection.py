"""Random projections with orthogonal rows: out[h,i,:] = |z_i| u_i, u_i rows of an orthogonal matrix, z_i ~ N(0, I_D).

Source: Yu et al., NeurIPS 2016; the sign fix: Mezzadri, Notices of the AMS 2007.
"""

import numpy as np

from .lsh_hash import hadamard_transform
from .philox import random_normal, random_signs

BLOCKS_STREAM, LENGTHS_STREAM, ROTATION_STREAM = 4, 5, 6


def haar_rows(normals, sign_fix):
    """Rows of the transpose of Q of the QR decomposition of each [D, D] matrix."""
    q, r = np.linalg.qr(normals)
    if sign_fix:
        q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return q.swapaxes(-1, -2)


def hadamard_rows(signs, dim, dtype):
    """signs [H, blocks, 3, D2] -> rows of H D_3 H D_2 H D_1, cut to D elements and scaled to E |u|^2 = 1."""
    padded = signs.shape[-1]
    columns = np.broadcast_to(np.eye(padded, dtype=dtype), (*signs.shape[:2], padded, padded))
    for i in range(3):
        columns = hadamard_transform(columns * signs[:, :, None, i]) / dtype(np.sqrt(padded))
    return columns.swapaxes(-1, -2)[..., :dim] * dtype(np.sqrt(padded / dim))


def orthogonal_projection(num_features, dim, *, seed, heads=None, kind="haar", dtype=np.float64):
    """-> [F, D], or [heads, F, D]."""
    count = 1 if heads is None else heads
    padded = 1 << (dim - 1).bit_length() if kind == "hadamard" else dim
    blocks = -(-num_features // padded)
    if kind == "hadamard":
        signs = random_signs((count, 3 * blocks, padded), seed, ROTATION_STREAM, dtype)
        rows = hadamard_rows(signs.reshape(count, blocks, 3, padded), dim, dtype)
    else:
        normals = random_normal((count, blocks * dim, dim), seed, BLOCKS_STREAM, dtype)
        rows = haar_rows(normals.reshape(count, blocks, dim, dim), kind == "haar")
    rows = rows.reshape(count, blocks * padded, dim)[:, :num_features]
    lengths = np.linalg.norm(random_normal((count, num_features, dim), seed, LENGTHS_STREAM, dtype), axis=-1)
    out = lengths[..., None] * rows
    return out[0] if heads is None else out
