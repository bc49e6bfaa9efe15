"""Exact attention, its parts and segment means with gradients."""

from __future__ import annotations

from jax import Array

from ._ops import MERGE_STATES, SEGMENT_MEAN, SOFTMAX_ATTENTION

__all__ = ["merge_states", "segment_mean", "softmax_attention"]


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    key_bias: Array | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`subquad.softmax_attention` with gradients for q, k, v and key_bias, through the result and through lse: the same
    keywords, shapes, values and errors.

    The backward pass keeps the inputs, the result and lse, and forms no N x M array. Forward mode and second
    derivatives raise jax's errors.
    """
    return SOFTMAX_ATTENTION(
        q=q, k=k, v=v, scale=scale, key_bias=key_bias, key_mask=key_mask, is_causal=is_causal, window=window,
        last=return_lse,
    )  # fmt: skip


def merge_states(out1: Array, lse1: Array, out2: Array, lse2: Array) -> tuple[Array, Array]:
    """`subquad.merge_states` with gradients for all four arrays, through both results."""
    return MERGE_STATES(out1=out1, lse1=lse1, out2=out2, lse2=lse2, last=True)


def segment_mean(
    x: Array,
    num_segments: int | None = None,
    *,
    segment_size: int | None = None,
    mask: Array | None = None,
    paired_mask: Array | None = None,
    return_counts: bool = False,
) -> Array | tuple[Array, Array]:
    """`subquad.segment_mean` with a gradient for x: the same keywords, shapes, values and errors."""
    return SEGMENT_MEAN(
        x=x, num_segments=num_segments, segment_size=segment_size, mask=mask, paired_mask=paired_mask,
        last=return_counts,
    )  # fmt: skip
