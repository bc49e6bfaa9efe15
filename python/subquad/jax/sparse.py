"""Sparse attention, SEA and what its training takes, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

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

# Patterns are trees of their arrays: arguments and results of what jax transforms.
for _kind, (_arrays, _others) in PATTERN_FIELDS.items():
    jax.tree_util.register_dataclass(_kind, _arrays, _others)


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    pattern: Any,
    *,
    scale: float | None = None,
    row_scale: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`subquad.sparse_attention` with gradients for q, k, v and row_scale, through the result and through lse: the same
    patterns, keywords, shapes, values and errors.

    The pattern and its weights are constants. Patterns are trees of their arrays, and so arguments and results of jit
    and vmap; with a CsrPattern vmap repeats the call, and what is wrong shows when a compiled function runs. The
    backward pass keeps the inputs; its memory is linear in the entries. Forward mode and second derivatives raise jax's
    errors.
    """
    parts = flat_pattern("sparse_attention", pattern, q, k)
    return SPARSE_ATTENTION(q=q, k=k, v=v, **parts, scale=scale, row_scale=row_scale, last=return_lse)


def sea_attention(
    q: Array,
    k: Array,
    v: Array,
    probs: Array,
    *,
    top_k: float = 64,
    group: str = "row_heads",
    scale: float | None = None,
    row_scale: Array | None = None,
    mix: Array | None = None,
    context: Array | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
    budget: str = "code",
    block_cap: int | None = None,
    return_lse: bool = False,
    return_pattern: bool = False,
) -> Any:
    """`subquad.sea_attention` with gradients for q, k, v, row_scale, mix and context, through the result and through
    lse, and for probs through the pooled context: the same keywords, shapes, values and errors.

    The selection is a constant. The backward pass keeps the inputs and selects again; its memory is linear in the
    selected keys. Forward mode and second derivatives raise jax's errors.
    """
    given: dict[str, Any] = dict(
        q=q, k=k, v=v, probs=probs, top_k=top_k, group=group, scale=scale, row_scale=row_scale, mix=mix,
        context=context, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal, budget=budget,
        block_cap=block_cap,
    )  # fmt: skip
    return sea_results(SEA_ATTENTION(last=True, **given), given, return_lse, return_pattern)


def running_mean(
    v: Array,
    *,
    num_queries: int | None = None,
    key_mask: Array | None = None,
    state: tuple[Array, Array] | None = None,
    return_state: bool = False,
) -> Any:
    """`subquad.running_mean` with a gradient for v: the same keywords, shapes, values and errors. Calls with a state
    are for decoding and not differentiated."""
    if state is None and not return_state:
        return RUNNING_MEAN(v=v, num_queries=num_queries, key_mask=key_mask)
    given: dict[str, Any] = {"v": v, "num_queries": num_queries, "key_mask": key_mask}
    return RUNNING_MEAN_STATE.with_state(state, return_state, **given)


def block_pool(v: Array, probs: Array, *, key_mask: Array | None = None, query_mask: Array | None = None) -> Array:
    """`subquad.block_pool` with gradients for v and probs: the same keywords, shapes, values and errors."""
    return BLOCK_POOL(v=v, probs=probs, key_mask=key_mask, query_mask=query_mask)


def expand_values(
    x: Array,
    num_keys: int,
    *,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """`subquad.expand_values` with a gradient for x: the same keywords, shapes, values and errors."""
    return EXPAND_VALUES(x=x, num_keys=num_keys, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal)


def block_sum(
    y: Array,
    num_columns: int,
    *,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """`subquad.block_sum` with a gradient for y: the same keywords, shapes, values and errors."""
    return BLOCK_SUM(y=y, num_columns=num_columns, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal)


def attention_divergence(
    q: Array,
    k: Array,
    q_teacher: Array,
    k_teacher: Array,
    *,
    scale: float | None = None,
    scale_teacher: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
) -> tuple[Array, Array]:
    """`subquad.attention_divergence` with gradients for q and k, through both results: the same keywords, shapes,
    values and errors. The teacher is a constant."""
    return ATTENTION_DIVERGENCE(
        q=q, k=k, q_teacher=q_teacher, k_teacher=k_teacher, scale=scale, scale_teacher=scale_teacher,
        key_mask=key_mask, query_mask=query_mask, is_causal=is_causal, last=True,
    )  # fmt: skip


def teacher_blocks(
    q: Array,
    k: Array,
    num_columns: int,
    *,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
) -> tuple[Array, Array, Array]:
    """`subquad.teacher_blocks`: the same keywords, shapes, values and errors. The teacher is a constant: its results
    pass no gradient on."""
    return TEACHER_BLOCKS(
        q=q, k=k, num_columns=num_columns, scale=scale, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal,
        last=True,
    )  # fmt: skip


def sea_estimate(
    q: Array,
    k: Array,
    v: Array,
    weights: Mapping[str, Array],
    *,
    is_causal: bool = False,
    key_mask: Array | None = None,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Any, ...]:
    """`subquad.sea_estimate` under jit and vmap: the same keywords, shapes, values and errors. It has no derivative:
    `subquad.torch.SeaAttention` trains the weights.
    """
    check_weights("sea_estimate", weights, is_causal is True)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "is_causal": is_causal, "key_mask": key_mask, **weights}
    if state is None and not return_state:
        return SEA_ESTIMATE(last=True, **given)
    results = SEA_ESTIMATE_STATE(last=True, state=state, **given)
    return (*results[:3], tuple(results[3:])) if return_state else results[:3]
