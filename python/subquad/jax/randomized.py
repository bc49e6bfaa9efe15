"""Randomized attention, LARA and EVA with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

from ._ops import EVA_ATTENTION, EVA_ATTENTION_STATE, LARA_ATTENTION, RANDOMIZED_ATTENTION

__all__ = ["eva_attention", "lara_attention", "randomized_attention"]


def randomized_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_samples: int = 1,
    noise_std: str | float = "exact",
    indices: Array | None = None,
    noise: Array | None = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    grad: str = "pathwise",
    seed: Any = 0,
) -> Array:
    """`subquad.randomized_attention` with gradients for q, k and v: the same keywords, shapes, values and errors.

    grad: "pathwise" holds the drawn keys fixed, as published, which leaves dq and dk biased; "unbiased" adds the
        score-function term.
    seed: an int or a 0-d array of any integer dtype. A compiled function is compiled again for another int, but not for
        another array.
    The backward pass draws again; it keeps the inputs. indices and noise take no part in differentiation.
    """
    return RANDOMIZED_ATTENTION(
        q=q, k=k, v=v, num_samples=num_samples, noise_std=noise_std, indices=indices, noise=noise, scale=scale,
        key_mask=key_mask, grad=grad, seed=seed,
    )  # fmt: skip


def lara_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_landmarks: int = 49,
    landmarks: tuple[Array, Array] | None = None,
    mis: str = "opt",
    alpha_coeff: float = 1.0,
    t_norm: str = "query",
    samples_per_landmark: int = 1,
    antithetic: bool = False,
    noise: Array | None = None,
    noise_std: str | float = "exact",
    seed: Any = None,
    scale: float | None = None,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`subquad.lara_attention` with gradients for q, k, v and both landmark arrays: the same keywords, shapes, values
    and errors.

    seed: None for evaluation without noise, an int, or a 0-d array of any integer dtype.
    The backward pass draws again; it keeps the inputs, the result and lse. noise and lse take no part in
    differentiation.
    """
    return LARA_ATTENTION(
        q=q, k=k, v=v, num_landmarks=num_landmarks, landmarks=landmarks, mis=mis, alpha_coeff=alpha_coeff,
        t_norm=t_norm, samples_per_landmark=samples_per_landmark, antithetic=antithetic, noise=noise,
        noise_std=noise_std, seed=seed, scale=scale, key_mask=key_mask, query_mask=query_mask,
        last=return_lse,
    )  # fmt: skip


def eva_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int = 64,
    chunk_size: int = 64,
    landmarks: tuple[Array, Array] | None = None,
    noise: Array | None = None,
    partition: bool = True,
    chunk_mass: bool = True,
    state: Sequence[Array | None] | None = None,
    return_state: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    seed: Any = None,
) -> Any:
    """`subquad.eva_attention` with gradients for q, k, v and both landmark arrays: the same keywords, shapes, values
    and errors.

    seed: None for evaluation without noise, an int, or a 0-d array of any integer dtype.
    state, return_state: for decoding. Such a call has no gradients: to differentiate it raises RuntimeError.
    The backward pass draws again; it keeps the inputs, the result and lse. noise and lse take no part in
    differentiation.
    """
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "window": window, "chunk_size": chunk_size, "landmarks": landmarks, "noise": noise,
        "partition": partition, "chunk_mass": chunk_mass, "scale": scale, "key_mask": key_mask, "is_causal": is_causal,
        "seed": seed,
    }  # fmt: skip
    if state is None and not return_state:
        return EVA_ATTENTION(**given, last=return_lse)
    return EVA_ATTENTION_STATE.with_state(state, return_state, return_lse, **given)
