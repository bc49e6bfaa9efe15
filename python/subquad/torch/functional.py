"""The functions of `subquad` with autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._ops import COLLISION_ATTENTION, YOSO_ATTENTION

__all__ = ["collision_attention", "yoso_attention"]


def _refuse_out(op: str, out: Any) -> None:
    if out is not None:
        got = type(out).__name__
        raise TypeError(f"[{op}] out: expected None, autograd makes new results, got {got}: use subquad.{op}")


def _seed_arguments(seed: int | Tensor) -> tuple[Any, Tensor | None]:
    """A seed as the pair (seed, seed_tensor) of a schema. A tensor stays one, so that nobody waits for its value."""
    if isinstance(seed, Tensor):
        return 0, seed
    if isinstance(seed, int) and 2**63 <= seed < 2**64:
        seed -= 2**64
    return seed, None


def yoso_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_hashes: int = 32,
    hash_bits: int = 8,
    hashing: str = "hadamard",
    carving: str = "strided",
    planes: Tensor | None = None,
    signs: Tensor | None = None,
    expectation: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    normalize: bool = True,
    seed: int | Tensor = 0,
    grad: str | None = None,
    return_lse: bool = False,
    out: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`subquad.yoso_attention` with gradients for q, k and v: the same keywords, shapes, values and errors.

    grad: "sampled" (default when sampling) and "sampled_exact" cost O(N), "lower_bound" and "exact" (default with
        expectation=True) O(N^2) time; see `subquad.yoso_attention_bwd`.
    seed: an int, or a 0-d int64 tensor on the CPU or the device of q. Neither makes torch.compile compile again, and
        nobody waits for the value of one on another device than the CPU.
    out: only None; `subquad.yoso_attention` can write into an array.
    The backward pass hashes q and k again. Beyond the inputs, it keeps the result and its log norms if normalize, else
    nothing. lse and explicit planes or signs take no part in differentiation, and there are no second derivatives.
    Under autocast q, k and v are cast to its dtype.
    """
    _refuse_out("yoso_attention", out)
    if return_lse and not normalize:
        raise ValueError("[yoso_attention] lse: expected normalize=True where it is asked for, got normalize=False")
    result, lse = YOSO_ATTENTION(
        q, k, v, num_hashes, hash_bits, hashing, carving, planes, signs, expectation, is_causal, normalize,
        *_seed_arguments(seed), grad, key_mask, query_mask,
    )  # fmt: skip
    return (result, lse) if return_lse else result


def collision_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hash_bits: int,
    *,
    grad: str = "exact",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    out: None = None,
) -> Tensor:
    """`subquad.collision_attention` with gradients for q, k and v: the same keywords, shapes, values and errors.

    grad: "exact", or "lower_bound" for the published surrogate; see `subquad.collision_attention_bwd`.
    """
    _refuse_out("collision_attention", out)
    result, _ = COLLISION_ATTENTION(q, k, v, hash_bits, grad, is_causal, key_mask, query_mask)
    return result
