"""Keys drawn with the probabilities of softmax attention, block by block of 64.

Block t replaces the block chosen before it if u[n, t] W_t < w_t (w_t: the sum of its weights, W_t: that of all blocks
up to it); u[n, T] draws the key from the chosen block by its cumulative weights. u: random_uniform([H * S, N, T + 1]).
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, visible_pairs
from .philox import random_uniform
from .softmax_attention import softmax_scale

SAMPLE_STREAM = 8
BLOCK = 64


def block_weights(q, k, scale, key_mask, dtype):
    """[B, H, N, T, 64]: e^{x - max x}, 0 for masked keys and behind the last key."""
    seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask)
    q, k = np.asarray(q).astype(dtype), repeat_heads(clear_masked(k, key_mask, dtype), q.shape[1])
    x = np.where(seen, softmax_scale(scale, q.shape[-1], dtype) * (q @ k.swapaxes(-1, -2)), dtype(-np.inf))
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(x - np.where(np.isneginf(top), dtype(0), top))
    padding = [(0, 0)] * 3 + [(0, -k.shape[2] % BLOCK)]
    return np.pad(weights, padding).reshape(*x.shape[:3], -1, BLOCK)


def softmax_sample(q, k, *, num_samples=1, scale=None, key_mask=None, seed=0, return_margin=False, dtype=np.float64):
    """-> indices [B, H, S, N] int32, -1 for a query without a key (, distance of the uniforms from a boundary)."""
    (batch, heads, seq_q), samples = q.shape[:3], num_samples
    weights = block_weights(q, k, scale, key_mask, dtype)[:, :, None]  # [B, H, 1, N, T, 64]
    blocks = weights.shape[-2]
    u = random_uniform((heads * samples, seq_q, blocks + 1), seed, SAMPLE_STREAM, dtype)
    u = u.reshape(heads, samples, seq_q, blocks + 1)[None]
    chosen = np.full((batch, heads, samples, seq_q), -1)
    margin = np.ones((batch, heads, samples, seq_q), dtype)
    total = np.zeros((batch, heads, 1, seq_q), dtype)
    for t in range(blocks):
        w = weights[..., t, :].sum(axis=-1)
        total = total + w
        ratio = np.divide(w, total, out=np.zeros_like(w), where=total != 0)
        chosen = np.where(u[..., t] * total < w, t, chosen)
        margin = np.where(w > 0, np.minimum(margin, np.abs(u[..., t] - ratio)), margin)
    none = chosen < 0
    if blocks == 0:
        return (chosen.astype(np.int32), margin) if return_margin else chosen.astype(np.int32)
    inside = np.take_along_axis(weights, np.maximum(chosen, 0)[..., None, None], axis=-2)[..., 0, :]
    cumulative = inside.cumsum(axis=-1)
    mass = cumulative[..., -1:]
    target = u[..., -1:] * mass
    key = chosen * BLOCK + (cumulative > target).argmax(axis=-1)
    distance = np.divide(np.abs(cumulative - target), mass, out=np.ones_like(cumulative), where=mass > 0).min(axis=-1)
    indices = np.where(none, -1, key).astype(np.int32)
    return (indices, np.where(none, dtype(1), np.minimum(margin, distance))) if return_margin else indices
