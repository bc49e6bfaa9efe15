"""Attention by hash collisions with autograd."""

from __future__ import annotations

from torch import Tensor

from ._ops import COLLISION_ATTENTION, YOSO_ATTENTION

__all__ = ["collision_attention", "yoso_attention"]


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
    return YOSO_ATTENTION(
        q=q, k=k, v=v, num_hashes=num_hashes, hash_bits=hash_bits, hashing=hashing, carving=carving, planes=planes,
        signs=signs, expectation=expectation, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal,
        normalize=normalize, seed=seed, grad=grad, out=out, last=return_lse,
    )  # fmt: skip


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
    return COLLISION_ATTENTION(
        q=q, k=k, v=v, hash_bits=hash_bits, grad=grad, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal,
        out=out,
    )  # fmt: skip
