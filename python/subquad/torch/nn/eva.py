"""The layer of efficient attention via control variates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..randomized import eva_attention
from ._layer import SelfAttention, adaptive, mean_of, without_masked

__all__ = ["EvaAttention"]


class EvaAttention(SelfAttention):
    """Multi-head self-attention via control variates (EVA): exact in a window, one summary for every chunk elsewhere.

        q, k, v = x Wq, x Wk, x Wv, split into heads
        q_bar_c, k_bar_c = maps of the means of the queries and keys of chunk c;  mu_c = (q_bar_c + k_bar_c) / 2
        y       = eva_attention(q, k, v) with the landmarks (k_bar, mu), merged, times Wo

    causal: mu_c = q_bar_c + k_bar_c, as published. With grouped heads q_bar is of the mean of a group's queries. The
    formulas are in `subquad.eva_attention`. Source: Zheng et al., ICLR 2023.

    In training mu is noisy, by a seed from torch's generator: torch.manual_seed makes a run repeatable, and activation
    checkpointing draws alike in both of its passes. Evaluation has no noise. Give a `generator` only without
    torch.compile and checkpointing: they follow none but torch's.

    When not to use it:
      - where single far tokens matter (copying, retrieval): a chunk is seen as its mean;
      - with weights trained for softmax attention and no tuning, unless neighbouring keys are alike;
      - for sequences of a few windows, where exact attention is as fast.

    Where it differs on purpose from the published modules [their way]:
      - chunks inside a query's own window are left out, and a chunk weighs as many keys as it has [partition=False,
        chunk_mass=False]; a chunk without a valid token has no weight [it shrinks the result];
      - means are over valid tokens [over all positions]; the last window and chunk may be short [padded, or an error];
      - chunk_size is given [from num_landmarks, N // num_landmarks; an error for fewer tokens];
      - noise has the standard deviation D^(1/4) of the theory [1], and is shared by the items of a batch [each its
        own];
      - causal: only chunks that end before the window are seen, so that decoding continues training [chunks of the
        window too];
      - one-dimensional, windows without overlap and relative position bias.

    Args:
        embed_dim: C, the features of a token.
        num_heads: H, the heads of the queries.
        num_kv_heads: the heads of keys and values, a divisor of num_heads (grouped-query attention); default num_heads.
        head_dim: D, default embed_dim / num_heads.
        window, chunk_size, partition, chunk_mass: see `subquad.eva_attention`.
        adaptive_proj: the maps. "default" (causal modules call it "qk"): Linear and LayerNorm for queries and keys;
            "no-ln": Linear; "none": Linear and LayerNorm for keys, mu = 0; None: no map, k_bar and mu are the mean
            keys.
        is_causal: token n sees tokens m <= n of its window, and the chunks before the window.
        bias: whether the projections have one.
        generator: of the seeds in training, on the device of the layer.

    Shape: x [B, N, C] and key_mask [B, N] bool, True = keep -> [B, N, C]. A masked token is not seen and sees nothing.
    State: {q,k,v,out}_proj.{weight,bias}; adaptive_mu_{q,k}.0.{weight [D, D], bias [D]}, Linear, and .1.{weight,bias}
        [D], LayerNorm, named as in the published modules. Of those modules qkv.{weight,bias}, split in three, are
        {q,k,v}_proj, and proj is out_proj; the causal one has the names used here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 64,
        chunk_size: int = 64,
        partition: bool = True,
        chunk_mass: bool = True,
        adaptive_proj: str | None = "default",
        is_causal: bool = False,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias, generator, device, dtype)
        self._expect_one_of("adaptive_proj", ("default", "no-ln", "none", None), adaptive_proj)
        for name, value in (("window", window), ("chunk_size", chunk_size)):
            self._expect(value >= 1, name, "a value of at least 1", value)
        divides = window % chunk_size == 0 or chunk_size % window == 0
        self._expect(divides or not partition, "chunk_size", f"a divisor or multiple of window = {window}", chunk_size)
        self.adaptive_proj, self.chunk_size, self.is_causal = adaptive_proj, chunk_size, is_causal
        self.options: dict[str, Any] = {
            "window": window, "chunk_size": chunk_size, "partition": partition, "chunk_mass": chunk_mass,
        }  # fmt: skip
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = adaptive_proj != "no-ln"
        maps_queries = adaptive_proj in ("default", "no-ln")
        self.adaptive_mu_q = adaptive(self.head_dim, norm, **factory) if maps_queries else None
        self.adaptive_mu_k = adaptive(self.head_dim, norm, **factory) if adaptive_proj is not None else None

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(x)
        y = eva_attention(
            q, k, v, landmarks=self._landmarks(q, k, key_mask), key_mask=key_mask, is_causal=self.is_causal,
            seed=self._new_seed() if self.training else None, **self.options,
        )  # fmt: skip
        return self._merged(without_masked(y, key_mask))

    def _landmarks(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if self.adaptive_mu_k is None:
            return None
        k_bar = self.adaptive_mu_k(mean_of(k, mask, size=self.chunk_size))
        if self.adaptive_mu_q is None:
            return k_bar, torch.zeros_like(k_bar)
        groups = mean_of(q, mask, size=self.chunk_size).unflatten(1, (self.num_kv_heads, -1))
        mu = self.adaptive_mu_q(groups.mean(2)) + k_bar
        return k_bar, mu if self.is_causal else 0.5 * mu

    def _described(self) -> dict[str, Any]:
        return self.options | {"adaptive_proj": self.adaptive_proj, "is_causal": self.is_causal}
