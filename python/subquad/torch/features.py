"""Feature maps and the attention they make, with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._ops import FEATURE_MAP, LINEAR_ATTENTION, LINEAR_ATTENTION_STATE, RFA_ATTENTION, RFA_ATTENTION_STATE

__all__ = ["feature_map", "linear_attention", "rfa_attention"]


def feature_map(
    x: Tensor,
    projection: Tensor | None = None,
    features: str = "positive",
    *,
    scale: float | None = None,
    log: bool = False,
    mask: Tensor | None = None,
    return_log_factor: bool = False,
    out: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subquad.feature_map` with gradients for x and projection, for trig features through the factor too: the same
    keywords, shapes, values and errors."""
    return FEATURE_MAP(
        x=x, projection=projection, features=features, scale=scale, log=log, mask=mask, out=out, last=return_log_factor
    )


def linear_attention(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    normalize: bool = True,
    log_features: bool = False,
    key_log_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    gate: Tensor | None = None,
    decay: Tensor | None = None,
    state: Sequence[Tensor | None] | None = None,
    return_state: bool = False,
    out: None = None,
) -> Any:
    """`subquad.linear_attention` with gradients for fq, fk, v, key_log_weight, gate and decay: the same keywords,
    shapes, values and errors.

    state, return_state: for decoding. Such a call has no gradients: a backward pass through it raises, as do arrays of
        a state that require grad.
    """
    given: dict[str, Any] = {
        "fq": fq, "fk": fk, "v": v, "is_causal": is_causal, "normalize": normalize, "log_features": log_features,
        "key_log_weight": key_log_weight, "key_mask": key_mask, "gate": gate, "decay": decay, "out": out,
    }  # fmt: skip
    if state is None and not return_state:
        return LINEAR_ATTENTION(**given)
    return LINEAR_ATTENTION_STATE.with_state(state, return_state, **given)


def rfa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: str = "positive",
    num_features: int = 256,
    projection: Tensor | None = None,
    orthogonal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    gate: Tensor | None = None,
    state: Sequence[Tensor | None] | None = None,
    return_state: bool = False,
    return_lse: bool = False,
    seed: int | Tensor = 0,
    out: None = None,
) -> Any:
    """`subquad.rfa_attention` with gradients for q, k, v, projection and gate: the same keywords, shapes, values and
    errors.

    seed: an int, or a 0-d int64 array on the CPU or the device of q. Neither makes torch.compile compile again.
    state, return_state: for decoding. Such a call has no gradients: a backward pass through it raises, as do arrays of
        a state that require grad.
    The backward pass forms the features again from the seed or the projection; it keeps the inputs, the result and lse,
    which takes no part in differentiation. There are no second derivatives. Under autocast q, k and v are cast to its
    dtype; the other arrays stay float32.
    """
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "features": features, "num_features": num_features, "projection": projection,
        "orthogonal": orthogonal, "scale": scale, "key_mask": key_mask, "is_causal": is_causal, "gate": gate,
        "seed": seed, "out": out,
    }  # fmt: skip
    if state is None and not return_state:
        return RFA_ATTENTION(**given, last=return_lse)
    return RFA_ATTENTION_STATE.with_state(state, return_state, return_lse, **given)
