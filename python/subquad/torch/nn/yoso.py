"""The layer of YOSO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hashing import yoso_attention
from ._layer import SelfAttention

__all__ = ["YosoAttention"]


class YosoAttention(SelfAttention):
    """Multi-head self-attention by Bernoulli sampling (YOSO): linear in the length, for models trained with it.

        q, k, v = x Wq, x Wk, x Wv, split into heads
        X_n     = (1 / num_hashes) sum_r sum_m [code_r(q_n) == code_r(k_m)] v_m
        y_n     = X_n / |X_n| + sum_j conv[h, j] v_(n + j - conv_window // 2), merged, times Wo

    A code is the signs of hash_bits random projections, so E[X_n] = sum_m (1 - angle(q_n, k_m) / pi)^hash_bits v_m,
    which expectation=True evaluates densely and without randomness. Source: Zeng et al., ICML 2021.

    In training each forward pass draws its own seed from torch's generator: torch.manual_seed makes a run repeatable,
    and activation checkpointing hashes alike in both of its passes. In evaluation the seed is the buffer `seed`, so
    that results repeat. Give a `generator` only without torch.compile and checkpointing: they follow none but torch's.

    When not to use it:
      - with weights trained for softmax attention: this kernel has no temperature, the model needs training or tuning;
      - where a row must find a key at any angle: one at 60 degrees weighs (2/3)^hash_bits;
      - for short sequences, where exact attention is faster (`subquad crossover` finds the length for a machine);
      - for decoding token by token: there is no cache.

    Where it differs on purpose from transformers' YosoSelfAttention and the published kernels [their way]:
      - the padding mask is honoured [1 + mask / 10000 keeps every token];
      - cosines are clipped, so that equal q and k give finite results and gradients [NaN];
      - the bits of a code come from different transforms, carving="strided" [from one, carving="published", which makes
        collisions of far vectors too rare];
      - q and k have their own codes under Gaussian hashing too [both get the key's];
      - every token counts, for any length and head dimension [the last N % 8 are dropped, small heads padded];
      - seeds make results repeatable [evaluation draws anew];
      - gradients in expectation are the true ones [grad="lower_bound"], and a row without collisions passes none;
      - no dropout on weights that are never formed and no output_attentions [the result under that name]; the output
        projection is inside [in YosoSelfOutput].

    Args:
        embed_dim: C, the features of a token.
        num_heads: H, the heads of the queries.
        num_kv_heads: the heads of keys and values, a divisor of num_heads (grouped-query attention); default num_heads.
        head_dim: D, default embed_dim / num_heads.
        num_hashes, hash_bits, hashing, carving, expectation, grad, normalize: see `subquad.yoso_attention`; hash_bits
            of about log2(N) leaves about one token in a bucket.
        conv_window: the odd length of a depthwise convolution of the values along the tokens, zero padded and one
            filter a head, which is added after normalisation; None for none.
        is_causal: token n sees tokens m <= n. Not together with conv_window, which looks ahead.
        bias: whether the projections have one.
        seed: that of evaluation.
        generator: of the seeds in training, on the device of the layer.

    Shape: x [B, N, C] and key_mask [B, N] bool, True = keep -> [B, N, C]. A masked token is not seen and sees nothing.
    State: {q,k,v,out}_proj.{weight,bias}; conv.weight [H, 1, conv_window, 1]; seed, int64.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_hashes: int = 32,
        hash_bits: int = 8,
        hashing: str = "hadamard",
        carving: str = "strided",
        expectation: bool = False,
        grad: str | None = None,
        normalize: bool = True,
        conv_window: int | None = None,
        is_causal: bool = False,
        bias: bool = True,
        seed: int = 0,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias, generator, device, dtype)
        self._keep_seed(seed)
        num_kv_heads = self.num_kv_heads
        if conv_window is not None:
            self._expect(conv_window >= 1 and conv_window % 2 == 1, "conv_window", "an odd number", conv_window)
            self._expect(not is_causal, "conv_window", "None with is_causal=True, as it looks ahead", conv_window)
        self.conv_window, self.is_causal = conv_window, is_causal
        self.options: dict[str, Any] = {
            "num_hashes": num_hashes, "hash_bits": hash_bits, "hashing": hashing, "carving": carving,
            "expectation": expectation, "grad": grad, "normalize": normalize,
        }  # fmt: skip
        self.conv = None
        if conv_window is not None:
            window, padding = (conv_window, 1), (conv_window // 2, 0)
            self.conv = nn.Conv2d(
                num_kv_heads,
                num_heads,
                window,
                padding=padding,
                groups=num_kv_heads,
                bias=False,
                device=device,
                dtype=dtype,
            )

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(x)
        masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": key_mask}
        draws = self.training and not self.options["expectation"]
        seed = self._new_seed() if draws else self.seed
        y: Any = yoso_attention(q, k, v, **masks, is_causal=self.is_causal, seed=seed, **self.options)
        if self.conv is not None:
            y = y + self.conv(v if key_mask is None else v.masked_fill(~key_mask[:, None, :, None], 0))
        return self._merged(y)

    def _described(self) -> dict[str, Any]:
        return {"conv_window": self.conv_window, "is_causal": self.is_causal} | self.options
