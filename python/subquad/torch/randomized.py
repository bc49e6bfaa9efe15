"""Randomized attention, LARA and EVA with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._ops import EVA_ATTENTION, EVA_ATTENTION_STATE, LARA_ATTENTION, RANDOMIZED_ATTENTION

__all__ = ["eva_attention", "lara_attention", "randomized_attention"]


def randomized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_samples: int = 1,
    noise_std: str | float = "exact",
    indices: Tensor | None = None,
    noise: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    grad: str = "pathwise",
    seed: int | Tensor = 0,
    out: None = None,
) -> Tensor:
    """`subquad.randomized_attention` with gradients for q, k and v: the same keywords, shapes, values and errors.

    grad: "pathwise" holds the drawn keys fixed, as published, which leaves dq and dk biased; "unbiased" adds the
        score-function term.
    seed: an int, or a 0-d int64 array on the CPU or the device of q. Neither makes torch.compile compile again.
    The backward pass draws again; it keeps the inputs. indices and noise take no part in differentiation, and there are
    no second derivatives. Under autocast q, k and v are cast to its dtype.
    """
    return RANDOMIZED_ATTENTION(
        q=q, k=k, v=v, num_samples=num_samples, noise_std=noise_std, indices=indices, noise=noise, scale=scale,
        key_mask=key_mask, grad=grad, seed=seed, out=out,
    )  # fmt: skip


def lara_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_landmarks: int = 49,
    landmarks: tuple[Tensor, Tensor] | None = None,
    mis: str = "opt",
    alpha_coeff: float = 1.0,
    t_norm: str = "query",
    samples_per_landmark: int = 1,
    antithetic: bool = False,
    noise: Tensor | None = None,
    noise_std: str | float = "exact",
    seed: int | Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_lse: bool = False,
    out: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subquad.lara_attention` with gradients for q, k, v and both landmark arrays: the same keywords, shapes, values
    and errors.

    seed: None for evaluation without noise, an int, or a 0-d int64 array on the CPU or the device of q.
    The backward pass draws again; it keeps the inputs, the result and lse. noise and lse take no part in
    differentiation, and there are no second derivatives. Under autocast q, k and v are cast to its dtype.
    """
    return LARA_ATTENTION(
        q=q, k=k, v=v, num_landmarks=num_landmarks, landmarks=landmarks, mis=mis, alpha_coeff=alpha_coeff,
        t_norm=t_norm, samples_per_landmark=samples_per_landmark, antithetic=antithetic, noise=noise,
        noise_std=noise_std, seed=seed, scale=scale, key_mask=key_mask, query_mask=query_mask, out=out,
        last=return_lse,
    )  # fmt: skip


def eva_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 64,
    chunk_size: int = 64,
    landmarks: tuple[Tensor, Tensor] | None = None,
    noise: Tensor | None = None,
    partition: bool = True,
    chunk_mass: bool = True,
    state: Sequence[Tensor | None] | None = None,
    return_state: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    out: None = None,
) -> Any:
    """`subquad.eva_attention` with gradients for q, k, v and both landmark arrays: the same keywords, shapes, values
    and errors.

    seed: None for evaluation without noise, an int, or a 0-d int64 array on the CPU or the device of q.
    state, return_state: for decoding. Such a call has no gradients: a backward pass through it raises, as do arrays of
        a state that require grad.
    The backward pass draws again; it keeps the inputs, the result and lse. noise and lse take no part in
    differentiation, and there are no second derivatives. Under autocast q, k and v are cast to its dtype.
    """
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "window": window, "chunk_size": chunk_size, "landmarks": landmarks, "noise": noise,
        "partition": partition, "chunk_mass": chunk_mass, "scale": scale, "key_mask": key_mask, "is_causal": is_causal,
        "seed": seed, "out": out,
    }  # fmt: skip
    if state is None and not return_state:
        return EVA_ATTENTION(**given, last=return_lse)
    return EVA_ATTENTION_STATE.with_state(state, return_state, return_lse, **given)
