"""What the attention layers share: projections, heads, seeds, checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..softmax import segment_mean


class SelfAttention(nn.Module):
    """The projections around an attention over the tokens of x [B, N, embed_dim], and the seeds of its draws."""

    seed: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        bias: bool,
        generator: torch.Generator | None,
        device: Any,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._expect(num_heads >= 1, "num_heads", "a value of at least 1", num_heads)
        divides = num_kv_heads >= 1 and num_heads % num_kv_heads == 0
        self._expect(divides, "num_kv_heads", f"a divisor of num_heads = {num_heads}", num_kv_heads)
        if head_dim is None:
            multiple = embed_dim % num_heads == 0
            self._expect(multiple, "embed_dim", f"a multiple of num_heads = {num_heads}, or head_dim", embed_dim)
            head_dim = embed_dim // num_heads
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.generator = generator
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, device=device, dtype=dtype)

    def _keep_seed(self, seed: int) -> None:
        """The seed of evaluation, as a buffer."""
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64, device=self.q_proj.weight.device))

    def _expect(self, holds: bool, name: str, expected: str, got: Any) -> None:
        if not holds:
            raise ValueError(f"[{type(self).__name__}] {name}: expected {expected}, got {got}")

    def _expect_one_of(self, name: str, choices: tuple[Any, ...], got: Any) -> None:
        *others, last = (repr(choice).replace("'", '"') for choice in choices)
        self._expect(got in choices, name, f"{', '.join(others)} or {last}", repr(got))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [B, heads, N, D]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)
        return q, k, v

    def _merged(self, y: Tensor) -> Tensor:
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _new_seed(self) -> Tensor:
        device = self.q_proj.weight.device
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=self.generator)

    def _described(self) -> dict[str, Any]:
        """The arguments in the representation, beside those of the projections."""
        return {}

    def extra_repr(self) -> str:
        own = {name: getattr(self, name) for name in ("num_heads", "num_kv_heads", "head_dim")} | self._described()
        return ", ".join([str(self.embed_dim), *(f"{name}={value!r}" for name, value in own.items())])


def adaptive(dim: int, norm: bool = True, **factory: Any) -> nn.Sequential:
    """The learned map of landmarks, with the initial weights of the published modules."""
    linear = nn.Linear(dim, dim, **factory)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, *([nn.LayerNorm(dim, **factory)] if norm else []))


def without_masked(y: Tensor, key_mask: Tensor | None) -> Tensor:
    """y [B, H, N, D] with zeros where a token is masked."""
    return y if key_mask is None else y.masked_fill(~key_mask[:, None, :, None], 0)


def mean_of(x: Tensor, mask: Tensor | None, count: int | None = None, size: int | None = None) -> Tensor:
    """Means over the valid tokens of `count` segments, or of chunks of `size` tokens."""
    mean: Any = segment_mean(x, count, segment_size=size, mask=mask)
    return mean
