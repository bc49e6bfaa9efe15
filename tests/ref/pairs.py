"""What every reference shares: which pairs are visible, grouped heads, and sums that skip unseen values."""

import numpy as np


def visible_pairs(batch, seq_q, seq_k, key_mask=None, query_mask=None, is_causal=False):
    """-> [B, 1, N, M] bool: query i sees key j. Causal: j <= i + (M - N), aligned at the end."""
    seen = np.ones((batch, 1, seq_q, seq_k), bool)
    if is_causal:
        seen &= np.arange(seq_k)[None, :] <= np.arange(seq_q)[:, None] + (seq_k - seq_q)
    if key_mask is not None:
        seen &= np.asarray(key_mask, bool)[:, None, None, :]
    if query_mask is not None:
        seen &= np.asarray(query_mask, bool)[:, None, :, None]
    return seen


def clear_masked(x, mask, dtype=np.float64):
    """x [B, H, N, D] in dtype, with zeros in place of the tokens that mask [B, N] leaves out, whatever they held."""
    x = np.asarray(x).astype(dtype)
    return x if mask is None else np.where(np.asarray(mask, bool)[:, None, :, None], x, dtype(0))


def repeat_heads(x, heads):
    """[B, Hkv, ...] -> [B, H, ...]: query head h uses key head h // (H // Hkv)."""
    return np.repeat(x, heads // x.shape[1], axis=1)


def sum_groups(x, heads_kv):
    """The transpose of repeat_heads: [B, H, M, D] -> [B, Hkv, M, D]."""
    batch, heads, *rest = x.shape
    return x.reshape(batch, heads_kv, heads // heads_kv, *rest).sum(axis=2)


def weighted_sum(weights, values):
    """out[..., i, :] = sum_j weights[..., i, j] values[..., j, :] over the j whose weight is not 0.

    A weight of 0 skips its value, so that a NaN reaches only the rows that take it.
    """
    weights = weights.astype(values.dtype)
    if np.isfinite(values).all():
        return weights @ values
    out = np.zeros((*weights.shape[:-1], values.shape[-1]), values.dtype)
    for row in np.ndindex(weights.shape[:-1]):
        used = weights[row] != 0
        out[row] = weights[row][used] @ values[row[:-1]][used]
    return out
