"""Attention layers: projections around the operators, with everything learned in the state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functional import yoso_attention

__all__ = ["YosoAttention"]


class YosoAttention(nn.Module):
    r"""Multi-head self-attention by Bernoulli sampling (YOSO): linear in the length, for models trained with it.

        q, k, v = x Wq, x Wk, x Wv      split into heads
        X_n     = (1 / num_hashes) sum_r sum_m [code_r(q_n) == code_r(k_m)] v_m
        y       = (X_n / |X_n| + sum_j conv[h, j] v_{n + j - conv_window // 2})  merged,  Wo

    The codes are the signs of `hash_bits` random projections, so E[X_n] = sum_m (1 - angle(q_n, k_m) / pi)^hash_bits v_m, which
    `expectation=True` evaluates (O(N^2) time, no randomness). Source: Zeng et al., ICML 2021.

    In training each forward pass draws its own seed, in evaluation the seed is the buffer `seed`, so that results repeat. The
    draw comes from `generator`, or torch's own: torch.manual_seed makes a run repeatable, and activation checkpointing hashes
    alike in both of its passes. A generator is not followed by torch.compile or by checkpointing; the default one is.

    When not to use it: with weights trained for softmax attention (this has no temperature and another kernel; it needs
    training or tuning); where a row must find one key among many at any angle (a key at 60 degrees weighs (2/3)^hash_bits);
    for short sequences, where exact attention is faster (below a few hundred tokens on a CPU: `subquad crossover`); for
    decoding token by token, as there is no cache.

    Where it differs on purpose from transformers' YosoSelfAttention and the published kernels: the padding mask is honoured
    (there, `1 + mask / 10000` keeps every token); cosines are clipped, so equal q and k give finite results and gradients
    (there NaN); q and k are hashed each by its own code (there, without the fast hash, both get the key's); the bits of a code
    come from different transforms (carving "strided"; "published" is theirs, and makes far collisions too rare); no tail of
    N % 8 tokens is dropped, and no head dimension is padded; seeds make results repeatable (there, evaluation draws anew);
    the default gradient in expectation is the true one (grad="lower_bound" is theirs); a row without collisions passes no
    gradient; output_attentions and dropout on weights that never exist are not offered. `out_proj` is theirs in YosoSelfOutput.

    Args:
        embed_dim: C, features of a token.
        num_heads: H, heads of the queries.
        num_kv_heads: heads of keys and values, a divisor of num_heads (grouped-query attention); default num_heads.
        head_dim: D, default embed_dim / num_heads.
        num_hashes, hash_bits, hashing, carving, expectation, grad, normalize: see `subquad.torch.yoso_attention`. hash_bits of
            about log2(N) keeps about one token in a bucket.
        conv_window: odd length of a depthwise convolution of the values along the tokens, added after normalisation, one
            filter a head, zero padded; None for none.
        is_causal: token n sees tokens m <= n. Not together with conv_window, which looks ahead.
        bias: whether the projections have one.
        seed: of evaluation.
        generator: of the seeds in training.

    Shape: x [B, N, C] and key_mask [B, N] bool, True = keep -> [B, N, C]. Masked tokens are neither seen nor see.
    State: q_proj, k_proj, v_proj, out_proj; conv.weight [H, 1, conv_window, 1]; seed (int64).
    """

    seed: Tensor

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
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1:
            raise ValueError(f"[YosoAttention] num_heads: expected a value of at least 1, got {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"[YosoAttention] num_kv_heads: expected a divisor of {num_heads}, got {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"[YosoAttention] embed_dim: expected a multiple of num_heads = {num_heads}, or head_dim, got {embed_dim}"
            )
        if conv_window is not None and (conv_window < 1 or conv_window % 2 == 0):
            raise ValueError(f"[YosoAttention] conv_window: expected an odd number, got {conv_window}")
        if conv_window is not None and is_causal:
            raise ValueError("[YosoAttention] conv_window: expected None with is_causal=True, it looks ahead, got a window")
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.conv_window, self.is_causal, self.generator = conv_window, is_causal, generator
        self.options = {
            "num_hashes": num_hashes, "hash_bits": hash_bits, "hashing": hashing, "carving": carving,
            "expectation": expectation, "grad": grad, "normalize": normalize,
        }  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, **factory)
        self.conv = None
        if conv_window is not None:
            self.conv = nn.Conv2d(
                num_kv_heads, num_heads, (conv_window, 1), padding=(conv_window // 2, 0), groups=num_kv_heads, bias=False,
                **factory,
            )  # fmt: skip
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64, device=device))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
            for proj, heads in (
                (self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads), (self.v_proj, self.num_kv_heads)
            )
        )  # fmt: skip
        y = yoso_attention(
            q, k, v, key_mask=key_mask, query_mask=key_mask, is_causal=self.is_causal, seed=self._next_seed(), **self.options
        )
        if self.conv is not None:
            kept = v if key_mask is None else v.masked_fill(~key_mask[:, None, :, None], 0)
            y = y + self.conv(kept)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _next_seed(self) -> Tensor:
        if not self.training or self.options["expectation"]:
            return self.seed
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=self.seed.device, generator=self.generator)

    def extra_repr(self) -> str:
        sizes = f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{sizes}, {options}, conv_window={self.conv_window}, is_causal={self.is_causal}"
