"""The estimator of SEA as a module: its learned parts, its projection and when that is drawn again."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import subquad

from . import _sea_parts as parts

__all__ = ["SeaEstimate", "SeaEstimator"]


class SeaEstimate(NamedTuple):
    """scores [B, H, N, K], the logits of probs; probs [B, H, N, K]; row_scale and mix [B, H, N]."""

    scores: Tensor
    probs: Tensor
    row_scale: Tensor
    mix: Tensor


class SeaEstimator(nn.Module):
    """Maps q, k and v to a compressed attention matrix, with gradients; the formulas are in `subquad.sea_estimate`.

    Every part has the name that `subquad.sea_estimate` gives it, so that `weights()` is what that function takes. In
    training the projection is drawn again after every `redraw_interval` steps of an optimizer, which the estimator sees
    by its weights having changed: passes under activation checkpointing or for accumulated gradients are of one step.
    Under torch.compile nothing is drawn: call `redraw` between steps.

    Args:
        num_heads, head_dim: H and D of q, k and v.
        is_causal: token n sees tokens m <= n. Also decides the decoder, features and positions.
        num_columns: K of the compressed matrix, a multiple of 4 (causal) or 2 in [4, 4096]; default 64 (causal) or 128.
        num_features: m, rows of the projection, in [1, 4096]; default D ln D / 8 (causal) or D ln D, rounded down, and
            at least 1.
        max_positions: rows of the table of positions; causal only.
        redraw_interval: steps between draws, or None: never.
        seed: of the projection; the next draw has the next seed.

    Shape: q, k, v [B, H, N, D], key_mask [B, N] bool, True = keep. Computes in float32, or in float64 given float64.
    State: the weights of `subquad.sea_estimate`, of which projection is a buffer; seed, int64.
    """

    projection: Tensor
    seed: Tensor
    encoder_weight: nn.Parameter

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        is_causal: bool = False,
        num_columns: int | None = None,
        num_features: int | None = None,
        max_positions: int = 2048,
        redraw_interval: int | None = 1000,
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_columns = (64 if is_causal else 128) if num_columns is None else num_columns
        if num_features is None:
            num_features = max(1, int(head_dim * math.log(head_dim) / (8 if is_causal else 1)))
        step = 4 if is_causal else 2
        whole = 4 <= self.num_columns <= 4096 and self.num_columns % step == 0
        _expect(whole, "num_columns", f"a multiple of {step} in [4, 4096]", self.num_columns)
        _expect(1 <= num_features <= 4096, "num_features", "a value in [1, 4096]", num_features)
        _expect(max_positions >= 1, "max_positions", "a value of at least 1", max_positions)
        _expect(
            redraw_interval is None or redraw_interval >= 1, "redraw_interval", "None or at least 1", redraw_interval
        )
        self.num_heads, self.head_dim, self.num_features = num_heads, head_dim, num_features
        self.is_causal, self.max_positions, self.redraw_interval = is_causal, max_positions, redraw_interval
        self._steps, self._version_seen = 0, -1
        self._make_parts({"device": device, "dtype": dtype})
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64, device=device))
        self.register_buffer("projection", self._rows(seed).to(self.encoder_weight.device))

    def _make_parts(self, factory: dict[str, Any]) -> None:
        dim, heads, causal = self.head_dim, self.num_heads, self.is_causal
        splits, width = (2, self.num_columns // 4) if causal else (4, self.num_columns // 2)
        channels = heads * splits
        if causal:
            self.position = nn.Parameter(torch.randn(self.max_positions, dim, **factory))
        self._add("encoder", nn.Linear(3 * dim, 2 * dim, **factory))
        self._add("encoder_norm", nn.LayerNorm(2 * dim, **factory))
        self._add("scaler", nn.Linear(2 * dim, 2, **factory))
        self._add("row", nn.Linear(2 * dim, splits * width, **factory))
        if causal:
            self._add("row_norm", nn.LayerNorm(width, **factory))
        self._add("conv1", nn.Conv2d(channels, channels, 3, **factory))
        self._add("conv2", nn.Conv2d(channels, channels, 3, **factory))
        if causal:
            self._add("out", nn.Linear(channels, heads, **factory))
            self._add("norm", nn.LayerNorm(self.num_columns, **factory))
        else:
            self._add("out", nn.Conv2d(channels, heads, 3, **factory))

    def _add(self, name: str, layer: nn.Module) -> None:
        """The weight and bias of a layer, with its initial values, under the names of the core."""
        for part in ("weight", "bias"):
            self.register_parameter(f"{name}_{part}", layer.get_parameter(part))

    def _rows(self, seed: int) -> Tensor:
        return torch.from_numpy(subquad.orthogonal_projection(self.num_features, self.head_dim, seed=seed))

    def weights(self) -> dict[str, Tensor]:
        """What `subquad.sea_estimate` takes."""
        return {name: x.detach().float() for name, x in self._parts().items()}

    def _parts(self) -> dict[str, Tensor]:
        return {"projection": self.projection, **dict(self.named_parameters(recurse=False))}

    @torch.no_grad()
    def redraw(self) -> None:
        """Draws the projection again."""
        self.seed += 1
        self.projection.copy_(self._rows(int(self.seed)))

    def _count_steps(self) -> None:
        version = self.encoder_weight._version
        if version == self._version_seen:
            return
        self._steps += self._version_seen >= 0
        self._version_seen = version
        if self.redraw_interval is not None and self._steps == self.redraw_interval:
            self._steps = 0
            self.redraw()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> SeaEstimate:
        if self.training and not torch.compiler.is_compiling():
            self._count_steps()
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        batch, heads, seq, _ = q.shape
        with torch.autocast(q.device.type, enabled=False):
            ranks = parts.Ranks(seq, key_mask, q)
            self._check_length(ranks)
            q, k, v = (ranks.pack(x.to(dtype)) for x in (q, k, v))
            weights = {name: x.to(dtype) for name, x in self._parts().items()}
            if batch * seq == 0:
                scores, scalers = (q.new_zeros(batch, heads, seq, n) for n in (self.num_columns, 2))
            else:
                scores, scalers = parts.estimate(q, k, v, weights, self.is_causal, ranks)
            row_scale, mix = ranks.unpack(scalers.sigmoid()).movedim(-1, 0).contiguous()
            return SeaEstimate(ranks.unpack(scores), ranks.unpack(scores.softmax(-1)), row_scale, mix)

    def _check_length(self, ranks: parts.Ranks) -> None:
        if not self.is_causal or ranks.seq <= self.max_positions:
            return
        longest = int(ranks.counts.max())
        _expect(longest <= self.max_positions, "q", f"at most max_positions = {self.max_positions} tokens", longest)

    def extra_repr(self) -> str:
        names = ("num_heads", "head_dim", "is_causal", "num_columns", "num_features", "redraw_interval")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _expect(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"[SeaAttention] {name}: expected {expected}, got {got}")
