"""The layer of random feature attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import subquad

from ..features import rfa_attention
from ._layer import SelfAttention, without_masked

__all__ = ["RfaAttention"]

_FEATURES = ("positive", "trig", "hyperbolic", "relu", "elu")


class RfaAttention(SelfAttention):
    """Multi-head self-attention by random features (RFA, Performer): linear in the length, with or without causality.

        q, k, v = x Wq, x Wk, x Wv, split into heads
        y_n     = sum_m <phi(q_n), phi(k_m)> v_m / sum_m <phi(q_n), phi(k_m)>, merged, times Wo

    with phi of `features` ("positive", "trig" and "hyperbolic": E <phi(q), phi(k)> = e^(q.k / sqrt(D))). gated: the
    sums over the past are S_n = g_n S_(n-1) + (1 - g_n) phi(k_n) v_n, with g = sigmoid(x Wg) for each key head.
    Sources: Choromanski et al., ICLR 2021; Peng et al., ICLR 2021 (trig, gates); Katharopoulos et al., ICML 2020 (elu).

    projection="drawn": in training each forward pass draws its own rows, by a seed from torch's generator:
    torch.manual_seed makes a run repeatable, and activation checkpointing draws alike in both of its passes. In
    evaluation the seed is the buffer `seed`. Give a `generator` only without torch.compile and checkpointing.

    When not to use it:
      - in place of softmax attention in a trained model where queries and keys are long: the variance of the estimate
        grows as e^|q + k|^2 / sqrt(D), and no number of features that is worth its time helps; train or tune with it;
      - where few tokens carry the result: the estimate of sharp attention is the least accurate;
      - for short sequences, where exact attention is faster (`subquad crossover` finds the length for a machine).

    Where it differs on purpose from performer-pytorch, the HKUNLP and the RFA code [their way]:
      - exactly stabilised, no epsilon, no clamp of the denominator [features + 1e-4, denominators from 1e-2];
      - the projection is Haar distributed, so that positive features are unbiased [QR without the sign fix];
      - evaluation and training draw the rows alike, orthogonal or not [HKUNLP: independent, then orthogonal];
      - a masked key is left out of all sums [performer-pytorch masks the values only];
      - gates are applied to the keys of a group of heads, and queries and keys are not normalised [RFA divides by
        their norms]; no sigma per head: projection="learned" has it as a special case;
      - no dropout on weights that are never formed and no output_attentions.

    Args:
        embed_dim: C, the features of a token.
        num_heads: H, the heads of the queries.
        num_kv_heads: the heads of keys and values, a divisor of num_heads (grouped-query attention); default num_heads.
        head_dim: D, default embed_dim / num_heads.
        features: "positive" | "trig" | "hyperbolic" | "relu" | "elu"; see `subquad.feature_map`. "elu" has no
        projection.
        num_features: F, rows of the projection, e.g. D ln D.
        projection: "drawn" anew in each training pass; "fixed", a buffer; "learned", a parameter.
        orthogonal: whether rows are drawn orthogonal.
        gated: whether the past is gated; needs is_causal.
        is_causal: token n sees tokens m <= n.
        bias: whether the projections have one.
        seed: that of evaluation, and of the rows that "fixed" and "learned" begin with.
        generator: of the seeds in training, on the device of the layer.

    Shape: x [B, N, C] and key_mask [B, N] bool, True = keep -> [B, N, C]. A masked token is not seen and sees nothing.
    State: {q,k,v,out}_proj.{weight,bias}; gate_proj.{weight [Hkv, C], bias [Hkv]} (gated); projection [Hkv, F, D]
        float32 ("fixed", "learned"); seed, int64. A projection_matrix [F, D] of performer-pytorch is such a projection
        for every head.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        features: str = "positive",
        num_features: int = 256,
        projection: str = "drawn",
        orthogonal: bool = True,
        gated: bool = False,
        is_causal: bool = False,
        bias: bool = True,
        seed: int = 0,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias, generator, device, dtype)
        self._keep_seed(seed)
        self._expect_one_of("features", _FEATURES, features)
        self._expect_one_of("projection", ("drawn", "fixed", "learned"), projection)
        self._expect(num_features >= 1, "num_features", "a value of at least 1", num_features)
        self._expect(is_causal or not gated, "gated", "False without is_causal", gated)
        self.features, self.num_features, self.orthogonal, self.is_causal = (
            features,
            num_features,
            orthogonal,
            is_causal,
        )
        self.gate_proj = nn.Linear(embed_dim, self.num_kv_heads, bias, device=device, dtype=dtype) if gated else None
        self.projection_kind = "none" if features == "elu" else projection
        self.projection: Tensor | None
        if self.projection_kind == "learned":
            self.projection = nn.Parameter(self._rows(seed).to(device))
        else:
            fixed = self.projection_kind == "fixed"
            self.register_buffer("projection", self._rows(seed).to(device) if fixed else None)

    def _rows(self, seed: int) -> Tensor:
        """The rows that rfa_attention would draw."""
        shape = (self.num_kv_heads, self.num_features, self.head_dim)
        if not self.orthogonal:
            return torch.from_numpy(subquad.random_normal(shape, seed=seed, stream=4))
        heads, *size = shape
        return torch.from_numpy(subquad.orthogonal_projection(*size, seed=seed, heads=heads))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(x)
        gate = None
        if self.gate_proj is not None:
            gate = self.gate_proj(x).sigmoid().transpose(1, 2).to(torch.float32).contiguous()
            if key_mask is not None:
                gate = gate.masked_fill(~key_mask[:, None], 1)
        projection = None if self.projection is None else self.projection.to(torch.float32)
        draws = self.training and self.projection_kind == "drawn"
        y = rfa_attention(
            q, k, v, features=self.features, num_features=self.num_features, projection=projection,
            orthogonal=self.orthogonal, key_mask=key_mask, is_causal=self.is_causal, gate=gate,
            seed=self._new_seed() if draws else self.seed,
        )  # fmt: skip
        return self._merged(without_masked(y, key_mask))

    def _described(self) -> dict[str, Any]:
        names = ("features", "num_features", "orthogonal", "is_causal")
        more = {"projection": self.projection_kind, "gated": self.gate_proj is not None}
        return {name: getattr(self, name) for name in names} | more
