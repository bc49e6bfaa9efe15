"""Attention by hash collisions with gradients."""

from __future__ import annotations

from typing import Any

from jax import Array

from ._ops import COLLISION_ATTENTION, YOSO_ATTENTION

__all__ = ["collision_attention", "yoso_attention"]


def yoso_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_hashes: int = 32,
    hash_bits: int = 8,
    hashing: str = "hadamard",
    carving: str = "strided",
    planes: Array | None = None,
    signs: Array | None = None,
    expectation: bool = False,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
    normalize: bool = True,
    seed: Any = 0,
    grad: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`subquad.yoso_attention` with gradients for q, k and v: the same keywords (but out), shapes, values and errors.

    grad: "sampled" (default when sampling) and "sampled_exact" cost O(N), "lower_bound" and "exact" (default with
        expectation=True) O(N^2) time; see `subquad.yoso_attention_bwd`.
    seed: an int or a 0-d array of any integer dtype. A compiled function is compiled again for another int, but not for
        another array; a jax.random key is refused.
    The other options have to be known when jax traces, and their errors are raised then.
    The backward pass hashes q and k again. Beyond the inputs, it keeps the result and its log norms if normalize, else
    nothing. lse and explicit planes or signs take no part in differentiation. Forward mode and second derivatives raise
    jax's errors.
    vmap folds its axis into the batch, and repeats the call where seed, planes or signs are mapped.
    """
    return YOSO_ATTENTION(
        q=q, k=k, v=v, num_hashes=num_hashes, hash_bits=hash_bits, hashing=hashing, carving=carving, planes=planes,
        signs=signs, expectation=expectation, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal,
        normalize=normalize, seed=seed, grad=grad, last=return_lse,
    )  # fmt: skip


def collision_attention(
    q: Array,
    k: Array,
    v: Array,
    hash_bits: int,
    *,
    grad: str = "exact",
    key_mask: Array | None = None,
    query_mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """`subquad.collision_attention` with gradients for q, k and v: the same keywords, shapes, values and errors.

    grad: "exact", or "lower_bound" for the published surrogate; see `subquad.collision_attention_bwd`.
    """
    return COLLISION_ATTENTION(
        q=q, k=k, v=v, hash_bits=hash_bits, grad=grad, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal
    )
