"""Exact attention, its parts and segment means with autograd."""

from __future__ import annotations

from torch import Tensor

from ._ops import MERGE_STATES, SEGMENT_MEAN, SOFTMAX_ATTENTION

__all__ = ["merge_states", "segment_mean", "softmax_attention"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
    out: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subquad.softmax_attention` with gradients for q, k, v and key_bias, through the result and through lse: the same
    keywords, shapes, values and errors.

    The backward pass keeps the inputs, the result and lse, and forms no N x M array. There are no second derivatives.
    Under autocast q, k and v are cast to its dtype; key_bias stays float32.
    """
    return SOFTMAX_ATTENTION(
        q=q, k=k, v=v, scale=scale, key_bias=key_bias, key_mask=key_mask, is_causal=is_causal, window=window, out=out,
        last=return_lse,
    )  # fmt: skip


def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """`subquad.merge_states` with gradients for all four arrays, through both results."""
    return MERGE_STATES(out1=out1, lse1=lse1, out2=out2, lse2=lse2, last=True)


def segment_mean(
    x: Tensor,
    num_segments: int | None = None,
    *,
    segment_size: int | None = None,
    mask: Tensor | None = None,
    paired_mask: Tensor | None = None,
    return_counts: bool = False,
    out: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subquad.segment_mean` with a gradient for x: the same keywords, shapes, values and errors."""
    return SEGMENT_MEAN(
        x=x, num_segments=num_segments, segment_size=segment_size, mask=mask, paired_mask=paired_mask, out=out,
        last=return_counts,
    )  # fmt: skip
