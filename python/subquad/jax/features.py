"""Feature maps and the attention they make, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

from ._ops import FEATURE_MAP, LINEAR_ATTENTION, LINEAR_ATTENTION_STATE, RFA_ATTENTION, RFA_ATTENTION_STATE

__all__ = ["feature_map", "linear_attention", "rfa_attention"]


def feature_map(
    x: Array,
    projection: Array | None = None,
    features: str = "positive",
    *,
    scale: float | None = None,
    log: bool = False,
    mask: Array | None = None,
    return_log_factor: bool = False,
) -> Array | tuple[Array, Array]:
    """`subquad.feature_map` with gradients for x and projection, for trig features through the factor too: the same
    keywords, shapes, values and errors."""
    return FEATURE_MAP(
        x=x, projection=projection, features=features, scale=scale, log=log, mask=mask, last=return_log_factor
    )


def linear_attention(
    fq: Array,
    fk: Array,
    v: Array,
    *,
    is_causal: bool = False,
    normalize: bool = True,
    log_features: bool = False,
    key_log_weight: Array | None = None,
    key_mask: Array | None = None,
    gate: Array | None = None,
    decay: Array | None = None,
    state: Sequence[Array | None] | None = None,
    return_state: bool = False,
) -> Any:
    """`subquad.linear_attention` with gradients for fq, fk, v, key_log_weight, gate and decay: the same keywords,
    shapes, values and errors.

    state, return_state: for decoding. Such a call has no gradients: to differentiate it raises RuntimeError.
    """
    given: dict[str, Any] = {
        "fq": fq, "fk": fk, "v": v, "is_causal": is_causal, "normalize": normalize, "log_features": log_features,
        "key_log_weight": key_log_weight, "key_mask": key_mask, "gate": gate, "decay": decay,
    }  # fmt: skip
    if state is None and not return_state:
        return LINEAR_ATTENTION(**given)
    return LINEAR_ATTENTION_STATE.with_state(state, return_state, **given)


def rfa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    features: str = "positive",
    num_features: int = 256,
    projection: Array | None = None,
    orthogonal: bool = True,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    gate: Array | None = None,
    state: Sequence[Array | None] | None = None,
    return_state: bool = False,
    return_lse: bool = False,
    seed: Any = 0,
) -> Any:
    """`subquad.rfa_attention` with gradients for q, k, v, projection and gate: the same keywords, shapes, values and
    errors.

    seed: an int or a 0-d array of any integer dtype. A compiled function is compiled again for another int, but not for
        another array.
    state, return_state: for decoding. Such a call has no gradients: to differentiate it raises RuntimeError.
    The backward pass forms the features again from the seed or the projection; it keeps the inputs, the result and lse,
    which takes no part in differentiation.
    """
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "features": features, "num_features": num_features, "projection": projection,
        "orthogonal": orthogonal, "scale": scale, "key_mask": key_mask, "is_causal": is_causal, "gate": gate,
        "seed": seed,
    }  # fmt: skip
    if state is None and not return_state:
        return RFA_ATTENTION(**given, last=return_lse)
    return RFA_ATTENTION_STATE.with_state(state, return_state, return_lse, **given)
