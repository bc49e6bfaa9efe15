"""The layer of linear randomized attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ..randomized import lara_attention
from ._layer import SelfAttention, adaptive, mean_of

__all__ = ["LaraAttention"]

_POOLS = ("pool", "pool-mixed", "pool-vmixed", "no-param-pool", "no-param-pool-mixed", "no-param-pool-vmixed")


class LaraAttention(SelfAttention):
    """Multi-head self-attention by linear randomized attention (LARA): linear in the length, not causal.

        q, k, v = x Wq, x Wk, x Wv, split into heads
        y       = lara_attention(q, k, v) with landmarks q_bar of the queries and k_bar of the keys, merged, times Wo

    Landmarks are C = num_landmarks means of the tokens, mapped by a learned Linear and LayerNorm; each proposes
    samples, which all queries share. The formulas are in `subquad.lara_attention`. Source: Zheng et al., ICML 2022.

    In training the samples are noisy, by a seed from torch's generator: torch.manual_seed makes a run repeatable, and
    activation checkpointing draws alike in both of its passes. In evaluation there is one sample per landmark and no
    noise. Give a `generator` only without torch.compile and checkpointing: they follow none but torch's.

    When not to use it:
      - for causal models: there is no causal form (see EvaAttention);
      - on tokens that resemble neither their neighbours nor any landmark: then it is hardly better than a mean of
        values;
      - with weights trained for softmax attention and no tuning, but with "no-param-pool-mixed" and mis="bh" at best;
      - for short sequences, where exact attention is faster (`subquad crossover` finds the length for a machine).

    Where it differs on purpose from the published module [its way]:
      - masked tokens are left out of means and statistics [they count in the divisor, and as biases after the Linear];
      - noise has the standard deviation that makes the estimate consistent [1: noise_std="published"];
      - noise is shared by the items of a batch [each has its own];
      - the mask is honoured for 2-D inputs too [ignored]; no dropout after the output projection.

    Args:
        embed_dim: C, the features of a token.
        num_heads: H, the heads of the queries.
        num_kv_heads: the heads of keys and values, a divisor of num_heads (grouped-query attention); default num_heads.
        head_dim: D, default embed_dim / num_heads.
        num_landmarks: for pools floor(sqrt(num_landmarks))^2 of them.
        proposal: "segment", means of segments of the valid tokens and nothing learned; "adaptive-1d", Linear and
            LayerNorm of every token first; for images "pool", adaptive average pooling, then Linear and LayerNorm;
            "pool-mixed", then k_bar <- softmax(k_bar k_bar^T / sqrt(D)) k_bar; "pool-vmixed", with ln(|mean of v| +
            1e-4) added to these logits; "no-param-" before a pool leaves out Linear and LayerNorm.
        pool_module: "light", one Linear of head_dim for all heads, or "dense", one of all channels.
        mis, alpha_coeff, t_norm, samples_per_landmark, antithetic, noise_std: see `subquad.lara_attention`; the
            published image models have alpha_coeff=2.
        bias: whether the projections have one.
        generator: of the seeds in training, on the device of the layer.

    Shape: x [B, N, C] and key_mask [B, N] bool, True = keep -> [B, N, C]; for pools x [B, height, width, C] and
        key_mask [B, height, width] -> [B, height, width, C]. A masked token is not seen and sees nothing. A landmark
        without a valid token is the map of 0.
    State: {q,k,v,out}_proj.{weight,bias}; {q,k}_bar_gen.0.{weight [d, d], bias [d]} and .1.{weight,bias} [d], Linear
        and LayerNorm, where d is head_dim ("light") or the channels of all heads ("dense"). From the published
        module: qkv.{weight,bias}, split in three, are {q,k,v}_proj; proj is out_proj; {q,k}_bar_gen.{2,3} of its pools
        are {q,k}_bar_gen.{0,1}; of adaptive-1d they have the same names.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_landmarks: int = 49,
        proposal: str = "segment",
        pool_module: str = "light",
        mis: str = "opt",
        alpha_coeff: float = 1.0,
        t_norm: str = "query",
        samples_per_landmark: int = 1,
        antithetic: bool = False,
        noise_std: str | float = "exact",
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias, generator, device, dtype)
        self._expect_one_of("proposal", ("segment", "adaptive-1d", *_POOLS), proposal)
        self._expect_one_of("pool_module", ("light", "dense"), pool_module)
        pooled = proposal in _POOLS
        self._expect(pooled or pool_module == "light", "pool_module", f'"light" with "{proposal}"', repr(pool_module))
        self._expect(num_landmarks >= 1, "num_landmarks", "a value of at least 1", num_landmarks)
        self.num_landmarks, self.proposal, self.pool_module, self.pooled = num_landmarks, proposal, pool_module, pooled
        self.options: dict[str, Any] = {
            "mis": mis,
            "alpha_coeff": alpha_coeff,
            "t_norm": t_norm,
            "noise_std": noise_std,
        }
        self.draws = {"samples_per_landmark": samples_per_landmark, "antithetic": antithetic}
        self.q_bar_gen = self.k_bar_gen = None
        if proposal == "adaptive-1d" or proposal.startswith("pool"):
            dense = self.head_dim if pool_module == "dense" else 0
            factory: dict[str, Any] = {"device": device, "dtype": dtype}
            self.q_bar_gen = adaptive(dense * num_heads or self.head_dim, **factory)
            self.k_bar_gen = adaptive(dense * self.num_kv_heads or self.head_dim, **factory)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        shape, given = x.shape, tuple(x.shape)
        expected = "[B, height, width, embed_dim]" if self.pooled else "[B, N, embed_dim]"
        self._expect(x.ndim == (4 if self.pooled else 3), "x", f"shape {expected}", list(given))
        if self.pooled:
            x, key_mask = x.flatten(1, 2), None if key_mask is None else key_mask.flatten(1)
        q, k, v = self._heads(x)
        landmarks = self._landmarks(q, k, v, key_mask, shape[1:-1])
        count = {"num_landmarks": self.num_landmarks} if landmarks is None else {}
        draws = self.draws | {"seed": self._new_seed()} if self.training else {}
        options: dict[str, Any] = self.options | count | draws
        y: Any = lara_attention(q, k, v, landmarks=landmarks, key_mask=key_mask, query_mask=key_mask, **options)
        return self._merged(y).reshape(shape)

    def _landmarks(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: Any
    ) -> tuple[Tensor, Tensor] | None:
        if self.proposal == "segment":
            return None
        if not self.pooled:
            count = min(self.num_landmarks, q.shape[2])
            return self._mean_of_mapped(self.q_bar_gen, q, mask, count), self._mean_of_mapped(
                self.k_bar_gen, k, mask, count
            )
        q_bar, k_bar = (
            self._map(self.q_bar_gen, self._pool(q, mask, size)),
            self._map(self.k_bar_gen, self._pool(k, mask, size)),
        )
        if self.proposal.endswith("mixed"):
            logits = self.head_dim**-0.5 * (k_bar @ k_bar.mT)
            if self.proposal.endswith("vmixed"):
                logits = logits + (self._pool(v, mask, size).norm(dim=-1) + 1e-4).log()[:, :, None]
            k_bar = logits.softmax(-1).to(k_bar.dtype) @ k_bar
        return q_bar, k_bar

    def _mean_of_mapped(self, module: nn.Module | None, x: Tensor, mask: Tensor | None, count: int) -> Tensor:
        assert module is not None
        return mean_of(module(x), mask, count)

    def _map(self, module: nn.Module | None, x: Tensor) -> Tensor:
        if module is None:
            return x
        if self.pool_module == "light":
            return module(x)
        return module(x.transpose(1, 2).flatten(2)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).contiguous()

    def _pool(self, x: Tensor, mask: Tensor | None, size: Any) -> Tensor:
        """Means of x [B, heads, N, D] over the valid tokens of the bins of an image: [B, heads, C, D]."""
        bins = math.isqrt(self.num_landmarks)
        batch, heads = x.shape[:2]
        if mask is not None:
            x = x.masked_fill(~mask[:, None, :, None], 0)
        images = x.transpose(2, 3).reshape(batch * heads, -1, *size)
        means = adaptive_avg_pool2d(images, bins).reshape(batch, heads, -1, bins * bins)
        if mask is not None:
            kept = adaptive_avg_pool2d(mask.to(x.dtype).reshape(batch, 1, *size), bins).reshape(batch, 1, 1, -1)
            means = means / kept.masked_fill(kept == 0, 1)
        return means.transpose(2, 3).contiguous()

    def _described(self) -> dict[str, Any]:
        names = ("num_landmarks", "proposal", "pool_module")
        return {name: getattr(self, name) for name in names} | self.options | self.draws
