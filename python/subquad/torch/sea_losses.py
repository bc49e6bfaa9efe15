"""Losses that teach a SEA layer to attend as a dense layer does, in time and memory linear in the columns.

For a row, S_b are the K scores, w_b the number of keys of block b, P_j the teacher's weight of key j and P_b the sum of
these over block b. The scores stand for Q_j = e^(S_b - L), b the block of j, L = ln sum_b w_b e^(S_b), and

    KL(P | Q)         = sum_j P_j ln P_j - sum_b P_b S_b + L
    sum_j (Q_j-P_j)^2 = sum_j P_j^2 - 2 sum_b e_b P_b + sum_b w_b e_b^2,   e_b = e^(S_b - L)

so that no N x N array is formed. Source: Lee et al., ICLR 2024, section 3.4 and appendix, and the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .nn.sea import SeaParts
from .sparse import attention_divergence, teacher_blocks

__all__ = ["distillation_loss", "estimator_divergence", "hidden_loss", "layer_loss", "logits_loss", "mean_squares"]


def _block_widths(scores: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, is_causal: bool) -> Tensor:
    """[B | 1, 1, N, K] int64: the keys of every block, of as many keys as queries."""
    seq, columns = scores.shape[2:]
    keys = torch.ones(1, seq, dtype=torch.int64, device=scores.device) if key_mask is None else key_mask.to(torch.int64)
    visible = keys.cumsum(-1) if is_causal else keys.sum(-1, keepdim=True).expand(-1, seq)
    if query_mask is not None:
        visible = visible * query_mask
    edges = torch.arange(columns + 1, device=scores.device)
    starts = (2 * edges * visible[..., None] + columns).div(2 * columns, rounding_mode="floor")
    return starts.diff(dim=-1)[:, None]


def estimator_divergence(
    scores: Tensor,
    masses: Tensor,
    sum_squares: Tensor,
    sum_plogp: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL(P | Q) and sum_j (Q_j - P_j)^2 of every row, [B, H, N], with gradients for scores.

    scores [B, H, N, K]; masses [B, H, N, K], sum_squares and sum_plogp [B, H, N] are those of `subquad.teacher_blocks`
    with the same masks, constants. A block without keys takes no part, and a row without keys gives 0.
    """
    widths = _block_widths(scores, key_mask, query_mask, is_causal)
    empty, sees = widths == 0, widths.sum(-1) > 0
    scores = scores.masked_fill(empty, 0)
    # a row without any key keeps its columns, so that no gradient is that of ln 0
    logits = scores.masked_fill(empty & sees[..., None], float("-inf"))
    total = (logits + widths.clamp(min=1).to(scores.dtype).log()).logsumexp(-1, keepdim=True)
    logs = (scores - total).masked_fill(empty, 0)
    weights = logs.exp()
    masses = masses.masked_fill(empty, 0)
    kl = sum_plogp - (masses * logs).sum(-1)
    sse = sum_squares + (weights * (widths * weights - 2 * masses)).sum(-1)
    return kl.masked_fill(~sees, 0), sse.masked_fill(~sees, 0)


def layer_loss(
    parts: SeaParts,
    q_teacher: Tensor,
    k_teacher: Tensor,
    context_teacher: Tensor,
    *,
    scale: float | None = None,
    scale_teacher: float | None = None,
) -> Tensor:
    """The loss of one layer: 0.1 KL(P | Q) + MSE(Q, P) for Q of the estimator's scores, the same for Q = softmax(scale
    q k^T) of the student's own queries and keys, and the mean square of what the layers give.

    parts: what SeaAttention(...)(x, return_parts=True) gives beside its result.
    q_teacher [B, H, N, Dt], k_teacher [B, Ht, N, Dt], context_teacher [B, H, N, D]: of the dense layer, constants; P =
        softmax(scale_teacher q_teacher k_teacher^T). scale, scale_teacher: None is D**-0.5 of either.

    KL is the mean over heads and valid tokens of causal layers, and over valid tokens alone, summed over the heads, of
    bidirectional ones; MSE is the mean over all B H N^2 entries, those of masked tokens being 0: all as published.
    """
    q_teacher, k_teacher, context_teacher = (x.detach() for x in (q_teacher, k_teacher, context_teacher))
    mask, is_causal = parts.key_mask, parts.is_causal
    masks: dict[str, Any] = {"key_mask": mask, "query_mask": mask, "is_causal": is_causal}
    batch, heads, seq, columns = parts.scores.shape
    teacher = teacher_blocks(q_teacher, k_teacher, columns, scale=scale_teacher, **masks)
    estimated = estimator_divergence(parts.scores, *teacher, **masks)
    dense = attention_divergence(
        parts.q, parts.k, q_teacher, k_teacher, scale=scale, scale_teacher=scale_teacher, **masks
    )
    tokens = max(batch * seq, 1) if mask is None else mask.sum().clamp(min=1)
    rows = tokens * heads if is_causal else tokens
    loss = mean_squares(parts.context, context_teacher, mask)
    for kl, sse in (estimated, dense):
        loss = loss + 0.1 * kl.sum() / rows + sse.sum() / max(batch * heads * seq * seq, 1)
    return loss


def mean_squares(x: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of (x - target)^2 over the valid tokens of [B, N, C] or [B, H, N, D]; 0 without any."""
    squares = (_wide(x) - _wide(target.detach())).square()
    if mask is None:
        return squares.sum() / max(squares.numel(), 1)
    valid = mask[..., None] if x.ndim == 3 else mask[:, None, :, None]
    valid = valid.expand_as(squares)
    return squares.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def hidden_loss(hidden: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """The mean over layers of the mean squares between hidden states [B, N, C], the embeddings being the first."""
    return torch.stack([mean_squares(x, y, mask) for x, y in zip(hidden, teacher, strict=True)]).mean()


def logits_loss(logits: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(softmax(teacher) | softmax(logits)) over the last axis, the mean over valid tokens [B, N], or over items if
    logits is [B, classes]; 0 without any."""
    logs, target = (_wide(x).log_softmax(-1) for x in (logits, teacher.detach()))
    kl = F.kl_div(logs, target, log_target=True, reduction="none").sum(-1)
    if mask is None:
        return kl.sum() / max(kl.numel(), 1)
    return kl.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def distillation_loss(
    layers: Sequence[Tensor], hidden: Tensor, logits: Tensor, task: Tensor, *, is_causal: bool
) -> Tensor:
    """The loss of a whole model from its parts: the mean of layer_loss over the layers, hidden_loss, logits_loss and
    the loss of the task, with the published weights 1, 5, 0.2, 0.1 of language models (causal) or 1, 10, 0.1, 0.1."""
    weights = (5, 0.2, 0.1) if is_causal else (10, 0.1, 0.1)
    rest = zip(weights, (hidden, logits, task), strict=True)
    return torch.stack(tuple(layers)).mean() + sum(weight * loss for weight, loss in rest)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
