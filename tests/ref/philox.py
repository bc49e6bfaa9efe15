"""Philox4x32-10, the counter-based generator behind every draw.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Element (l, n, d) of an array [..., H, N, D] takes word d % 4 of

    philox(counter = (n, d // 4, l, stream), key = (seed mod 2^32, seed div 2^32))

where l is the flat index over all axes before the last two. Missing leading axes count as 1.
"""

import numpy as np

PLANES_STREAM = 1
SIGNS_STREAM = 2
PAIR_STREAM = 3

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW_32 = np.uint64(0xFFFFFFFF)
HIGH_32 = np.uint64(32)


def philox4x32(counter, key, rounds=10):
    """counter [..., 4] uint32, key [..., 2] uint32 -> words [..., 4] uint32."""
    counter, key = np.asarray(counter, np.uint32), np.asarray(key, np.uint32)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key[..., 0].astype(np.uint64), key[..., 1].astype(np.uint64)
    for _ in range(rounds):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = (product1 >> HIGH_32) ^ c1 ^ k0, product1 & LOW_32
        c2, c3 = (product0 >> HIGH_32) ^ c3 ^ k1, product0 & LOW_32
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words_at(head, row, draw, seed, stream):
    """The word of element (head, row, draw); the three index arrays broadcast."""
    head, row, draw = np.broadcast_arrays(*(np.asarray(i, np.int64) for i in (head, row, draw)))
    seed = int(seed) % 2**64
    counter = np.stack([row, draw // 4, head, np.full_like(row, stream)], axis=-1)
    words = philox4x32(counter % 2**32, np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32))
    return np.take_along_axis(words, (draw % 4)[..., None], axis=-1)[..., 0]


def element_indices(shape):
    """shape [..., H, N, D] -> head, row, draw, each broadcastable to (leading, N, D)."""
    *leading, rows, draws = (1, 1, *shape)[-max(len(shape), 2) :]
    heads = int(np.prod(leading, dtype=np.int64))
    return np.arange(heads)[:, None, None], np.arange(rows)[:, None], np.arange(draws)


def random_words(shape, seed, stream):
    return words_at(*element_indices(shape), seed, stream).reshape(shape)


def random_uniform(shape, seed, stream=0, dtype=np.float64):
    """24 random bits an element: exact in float32, in [0, 1)."""
    return (random_words(shape, seed, stream) >> 8).astype(dtype) * dtype(2.0**-24)


def random_normal(shape, seed, stream=0, dtype=np.float64):
    """Box-Muller on the word pairs (0, 1) and (2, 3) of a counter: cosine first, sine second."""
    head, row, draw = element_indices(shape)
    first = words_at(head, row, draw - draw % 2, seed, stream).astype(dtype)
    second = words_at(head, row, draw - draw % 2 + 1, seed, stream).astype(dtype)
    radius = np.sqrt(dtype(-2) * np.log((first + dtype(1)) * dtype(2.0**-32)))
    angle = dtype(2 * np.pi) * (second * dtype(2.0**-32))
    return (radius * np.where(draw % 2 == 0, np.cos(angle), np.sin(angle))).reshape(shape)


def random_signs(shape, seed, stream, dtype=np.float64):
    return np.where(random_words(shape, seed, stream) >> 31, dtype(-1), dtype(1))
