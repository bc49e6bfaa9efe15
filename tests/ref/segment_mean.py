"""Means of consecutive tokens, over the valid ones only; 0 for a segment without one.

num_segments cuts the V valid tokens of an item into S = min(num_segments, V (, V')) segments: the first
S (V // S + 1) - V of V // S tokens, the others of one more. segment_size: segment c is tokens [c size, (c + 1) size).
"""

import numpy as np

from .pairs import clear_masked


def segments(valid, num_segments, segment_size, paired):
    """valid [N] bool -> the segment of each token, -1 for none. paired: valid tokens of the other sequence or None."""
    index = np.full(len(valid), -1)
    if segment_size is not None:
        index[valid] = np.nonzero(valid)[0] // segment_size
        return index
    count = int(valid.sum())
    kept = min(num_segments, count) if paired is None else min(num_segments, count, paired)
    if kept > 0:
        size = count // kept
        sizes = [size if c < kept * (size + 1) - count else size + 1 for c in range(kept)]
        index[valid] = np.repeat(np.arange(kept), sizes)
    return index


def membership(batch, seq, num_segments, segment_size, mask, paired_mask):
    """[B, C, N] bool: token n is a valid one of segment c."""
    mask = np.ones((batch, seq), bool) if mask is None else np.asarray(mask, bool)
    paired = [None] * batch if paired_mask is None else [int(np.sum(row)) for row in np.asarray(paired_mask, bool)]
    count = num_segments if segment_size is None else -(-seq // segment_size)
    rows = [segments(mask[b], num_segments, segment_size, paired[b]) for b in range(batch)]
    return np.stack(rows)[:, None, :] == np.arange(count)[:, None] if batch else np.zeros((0, count, seq), bool)


def segment_mean(
    x, num_segments=None, *, segment_size=None, mask=None, paired_mask=None, return_counts=False, dtype=np.float64
):
    """x [B, H, N, D] -> [B, H, C, D] (, counts [B, C])."""
    member = membership(x.shape[0], x.shape[2], num_segments, segment_size, mask, paired_mask)
    counts = member.sum(axis=-1)
    total = member[:, None].astype(dtype) @ clear_masked(x, mask, dtype)
    out = total / np.maximum(counts, 1).astype(dtype)[:, None, :, None]
    return (out, counts.astype(np.int32)) if return_counts else out


def segment_mean_bwd(
    dout, seq, num_segments=None, *, segment_size=None, mask=None, paired_mask=None, base=None, dtype=np.float64
):
    """dx [B, H, seq, D]: every valid token gets dout / count of its segment, every other token 0; plus base."""
    member = membership(dout.shape[0], seq, num_segments, segment_size, mask, paired_mask)
    counts = np.maximum(member.sum(axis=-1), 1).astype(dtype)[:, None, :, None]
    used = member.any(axis=-1)[:, None, :, None]
    share = np.where(used, np.asarray(dout).astype(dtype) / counts, dtype(0))
    dx = member[:, None].swapaxes(-1, -2).astype(dtype) @ share
    return dx if base is None else dx + np.asarray(base).astype(dtype)
