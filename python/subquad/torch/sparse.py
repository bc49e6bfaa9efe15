"""Sparse attention, SEA and what its training takes, with autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .._differentiable_sparse import PATTERN_FIELDS, flat_pattern, sea_results
from ..sea import check_weights
from ._ops import (
    ATTENTION_DIVERGENCE,
    BLOCK_POOL,
    BLOCK_SUM,
    EXPAND_VALUES,
    RUNNING_MEAN,
    RUNNING_MEAN_STATE,
    SEA_ATTENTION,
    SEA_ESTIMATE,
    SEA_ESTIMATE_STATE,
    SPARSE_ATTENTION,
    TEACHER_BLOCKS,
)

__all__ = [
    "attention_divergence",
    "block_pool",
    "block_sum",
    "expand_values",
    "running_mean",
    "sea_attention",
    "sea_estimate",
    "sparse_attention",
    "teacher_blocks",
]


def _register_pattern(kind: Any, arrays: list[str], others: list[str]) -> None:
    """Makes a pattern a tree of its tensors, for what takes trees as arguments and results: vmap, torch.export."""

    def flatten(pattern: Any) -> tuple[list[Any], Any]:
        present = [name for name in arrays if getattr(pattern, name) is not None]
        # Lists, as they come back from the file of an exported program.
        rest = [list(x) if isinstance(x, tuple) else x for x in (getattr(pattern, name) for name in others)]
        return [getattr(pattern, name) for name in present], [present, rest]

    def flatten_with_keys(pattern: Any) -> tuple[list[Any], Any]:
        leaves, context = flatten(pattern)
        return [(_pytree.GetAttrKey(name), x) for name, x in zip(context[0], leaves, strict=True)], context

    def unflatten(leaves: Any, context: Any) -> Any:
        present, rest = context
        return kind(**dict(zip(present, leaves, strict=True)), **dict(zip(others, rest, strict=True)))

    name = f"subquad.{kind.__name__}"
    _pytree.register_pytree_node(
        kind, flatten, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys
    )


for _kind, (_arrays, _others) in PATTERN_FIELDS.items():
    _register_pattern(_kind, _arrays, _others)
    torch.serialization.add_safe_globals([_kind])


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Any,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    return_lse: bool = False,
    out: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subquad.sparse_attention` with gradients for q, k, v and row_scale, through the result and through lse: the same
    patterns, keywords, shapes, values and errors.

    The pattern and its weights are constants. Patterns are trees of their tensors, and so arguments and results of
    torch.compile, torch.vmap and torch.export; over a CsrPattern torch.vmap repeats the call. The backward pass keeps
    the inputs; its memory is linear in the entries. There are no second derivatives. Under autocast q, k and v are cast
    to its dtype.
    """
    parts = flat_pattern("sparse_attention", pattern, q, k)
    return SPARSE_ATTENTION(q=q, k=k, v=v, **parts, scale=scale, row_scale=row_scale, out=out, last=return_lse)


def sea_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    *,
    top_k: float = 64,
    group: str = "row_heads",
    scale: float | None = None,
    row_scale: Tensor | None = None,
    mix: Tensor | None = None,
    context: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    budget: str = "code",
    block_cap: int | None = None,
    return_lse: bool = False,
    return_pattern: bool = False,
    out: None = None,
) -> Any:
    """`subquad.sea_attention` with gradients for q, k, v, row_scale, mix and context, through the result and through
    lse, and for probs through the pooled context: the same keywords, shapes, values and errors.

    The selection is a constant. The backward pass keeps the inputs and selects again; its memory is linear in the
    selected keys. There are no second derivatives. Under autocast q, k, v and context are cast to its dtype.
    """
    given: dict[str, Any] = dict(
        q=q, k=k, v=v, probs=probs, top_k=top_k, group=group, scale=scale, row_scale=row_scale, mix=mix,
        context=context, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal, budget=budget,
        block_cap=block_cap, out=out,
    )  # fmt: skip
    return sea_results(SEA_ATTENTION(last=True, **given), given, return_lse, return_pattern)


def running_mean(
    v: Tensor,
    *,
    num_queries: int | None = None,
    key_mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    out: None = None,
) -> Any:
    """`subquad.running_mean` with a gradient for v: the same keywords, shapes, values and errors. Calls with a state
    are for decoding and not differentiated."""
    if state is None and not return_state:
        return RUNNING_MEAN(v=v, num_queries=num_queries, key_mask=key_mask, out=out)
    given: dict[str, Any] = {"v": v, "num_queries": num_queries, "key_mask": key_mask, "out": out}
    return RUNNING_MEAN_STATE.with_state(state, return_state, **given)


def block_pool(
    v: Tensor, probs: Tensor, *, key_mask: Tensor | None = None, query_mask: Tensor | None = None, out: None = None
) -> Tensor:
    """`subquad.block_pool` with gradients for v and probs: the same keywords, shapes, values and errors."""
    return BLOCK_POOL(v=v, probs=probs, key_mask=key_mask, query_mask=query_mask, out=out)


def expand_values(
    x: Tensor,
    num_keys: int,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`subquad.expand_values` with a gradient for x: the same keywords, shapes, values and errors."""
    return EXPAND_VALUES(x=x, num_keys=num_keys, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal)


def block_sum(
    y: Tensor,
    num_columns: int,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`subquad.block_sum` with a gradient for y: the same keywords, shapes, values and errors."""
    return BLOCK_SUM(y=y, num_columns=num_columns, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal)


def attention_divergence(
    q: Tensor,
    k: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    scale: float | None = None,
    scale_teacher: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`subquad.attention_divergence` with gradients for q and k, through both results: the same keywords, shapes,
    values and errors. The teacher is a constant."""
    return ATTENTION_DIVERGENCE(
        q=q, k=k, q_teacher=q_teacher, k_teacher=k_teacher, scale=scale, scale_teacher=scale_teacher,
        key_mask=key_mask, query_mask=query_mask, is_causal=is_causal, last=True,
    )  # fmt: skip


def teacher_blocks(
    q: Tensor,
    k: Tensor,
    num_columns: int,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`subquad.teacher_blocks`: the same keywords, shapes, values and errors. The teacher is a constant: its results
    pass no gradient on."""
    return TEACHER_BLOCKS(
        q=q, k=k, num_columns=num_columns, scale=scale, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal,
        last=True,
    )  # fmt: skip


def sea_estimate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Mapping[str, Tensor],
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Any, ...]:
    """`subquad.sea_estimate` under torch.compile: the same keywords, shapes, values and errors. It has no derivative:
    `SeaAttention` trains the weights by torch's own operators.
    """
    check_weights("sea_estimate", weights, is_causal is True)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "is_causal": is_causal, "key_mask": key_mask, **weights}
    if state is None and not return_state:
        return SEA_ESTIMATE(last=True, **given)
    results = SEA_ESTIMATE_STATE(last=True, state=state, **given)
    return (*results[:3], tuple(results[3:])) if return_state else results[:3]
