"""What a causal SeaAttention carries from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SeaState"]


class _Cache:
    """Keys, values and mask in arrays with room behind the tokens that are used."""

    def __init__(self, k: Tensor, v: Tensor, capacity: int):
        self.keys, self.values = (x.new_empty((*x.shape[:2], capacity, x.shape[3])) for x in (k, v))
        self.mask = torch.ones((k.shape[0], capacity), dtype=torch.bool, device=k.device)
        self.used, self.masked = 0, False

    def write(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        begin, self.used = self.used, self.used + k.shape[2]
        self.keys[:, :, begin : self.used] = k
        self.values[:, :, begin : self.used] = v
        if mask is not None:
            self.mask[:, begin : self.used] = mask
            self.masked = True

    def tokens(self, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = self.mask[:, :length] if self.masked else None
        return self.keys[:, :, :length], self.values[:, :, :length], mask


@dataclass(frozen=True)
class SeaState:
    """The tokens so far: their keys and values, and what the estimator and the running mean made of them. A state stays
    as it is: calls that go on from the same state do not disturb each other.

    length: tokens so far, masked ones included.
    estimate, mean: the states of `subquad.sea_estimate` and `subquad.running_mean`.
    """

    length: int
    estimate: Sequence[Tensor]
    mean: Sequence[Tensor]
    cache: _Cache

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H, length, D], and which of them count, or None: all."""
        return self.cache.tokens(self.length)


def extended(state: SeaState | None, k: Tensor, v: Tensor, mask: Tensor | None) -> _Cache:
    """The cache with more tokens: the same one while it has room and no other call went on from this state."""
    length = 0 if state is None else state.length
    cache = None if state is None else state.cache
    if cache is None or cache.used != length or length + k.shape[2] > cache.keys.shape[2]:
        old, cache = cache, _Cache(k, v, max(64, 2 * length, length + k.shape[2]))
        if old is not None:
            cache.write(*old.tokens(length))
    cache.write(k, v, mask)
    return cache
