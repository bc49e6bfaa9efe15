"""The estimator of SEA in plain torch, from q, k and v to the logits of a compressed attention matrix.

Everything here works on packed items: token r is the r-th valid token of its item, and zeros follow behind the last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features import linear_attention

Weights = Mapping[str, Tensor]


class Ranks:
    """The valid tokens of every item moved to its front, and back to their places."""

    def __init__(self, seq: int, mask: Tensor | None, like: Tensor):
        self.mask, self.seq = mask, seq
        self.index = torch.arange(seq, device=like.device)
        if mask is None:
            self.counts, self.valid = torch.full((1,), seq, device=like.device), None
            return
        self.counts = mask.sum(-1)
        self.valid = self.index < self.counts[:, None]
        self.order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
        self.rank = (mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)

    def pack(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return x
        return self.only_valid(x.gather(2, self.order[:, None, :, None].expand_as(x)))

    def unpack(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return x
        rows = x.gather(2, self.rank[:, None, :, None].expand_as(x))
        return rows.masked_fill(~self.mask[:, None, :, None], 0)

    def only_valid(self, x: Tensor) -> Tensor:
        """x [B, H, N, *] with zeros behind the last token of every item."""
        return x if self.valid is None else x.masked_fill(~self.valid[:, None, :, None], 0)


def estimate(q: Tensor, k: Tensor, v: Tensor, w: Weights, is_causal: bool, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The logits [B, H, N, K], and those of row_scale and mix [B, H, N, 2]."""
    context = _causal_context(q, k, v, w, ranks) if is_causal else _whole_context(q, k, v, w, ranks)
    x = F.linear(torch.cat([context, v], -1), w["encoder_weight"], w["encoder_bias"])
    z = F.gelu(F.layer_norm(x, x.shape[-1:], w["encoder_norm_weight"], w["encoder_norm_bias"]))
    rows = _channels(z, w)
    scores = _causal_decoder(rows, w) if is_causal else _whole_decoder(rows, w, ranks)
    return scores, F.linear(z, w["scaler_weight"], w["scaler_bias"])


def _projected(x: Tensor, w: Weights) -> Tensor:
    return F.linear(x, w["projection"] * x.shape[-1] ** -0.25)


def _with_ones(position: Tensor, v: Tensor) -> Tensor:
    """[position | v | 1]: the last column of a sum of these is its denominator."""
    return torch.cat([position.expand(*v.shape[:3], -1), v, torch.ones_like(v[..., :1])], -1)


def _causal_context(q: Tensor, k: Tensor, v: Tensor, w: Weights, ranks: Ranks) -> Tensor:
    fq, fk = (_projected(x, w).relu() + 1e-3 for x in (q, k))
    position = w["position"][: ranks.seq]
    # behind the table there is only padding
    values = _with_ones(F.pad(position, (0, 0, 0, ranks.seq - position.shape[0])), v)
    fk = ranks.only_valid(fk)
    # linear_attention takes 512 columns of values at a time
    parts = [linear_attention(fq, fk, x, is_causal=True, normalize=False) for x in values.split(512, -1)]
    sums = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return sums[..., :-1] / (sums[..., -1:] + 1e-6 * fq.sum(-1, keepdim=True))


def _whole_context(q: Tensor, k: Tensor, v: Tensor, w: Weights, ranks: Ranks) -> Tensor:
    fq = _exp_features(q, w, None, (-1,))
    fk = ranks.only_valid(_exp_features(k, w, ranks.valid, (-2, -1)))
    sums = fq @ (fk.transpose(-1, -2) @ _with_ones(_interpolated_identity(v, ranks), v))
    # zero only where an item has no token at all
    return sums[..., :-1] / sums[..., -1:].masked_fill(sums[..., -1:] == 0, 1)


def _exp_features(x: Tensor, w: Weights, valid: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """dims: over which the largest projection is taken out of the exponents."""
    u = _projected(x, w)
    if valid is not None:
        u = u.masked_fill(~valid[:, None, :, None], float("-inf"))
    largest = u.detach().amax(dims, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0)
    half = 0.5 * x.shape[-1] ** -0.5 * x.square().sum(-1, keepdim=True)
    return u.shape[-1] ** -0.5 * ((u - half - largest).exp() + 1e-4)


def _interpolated_identity(v: Tensor, ranks: Ranks) -> Tensor:
    """[B | 1, 1, N, d]: row r is that of the d x d identity at r (d - 1) / (n - 1), between two rows of it."""
    dim = v.shape[-1]
    last = (ranks.counts - 1).clamp(min=1)[:, None]
    at = torch.minimum(ranks.index, last).to(v.dtype) * (dim - 1) / last
    columns = torch.arange(dim, device=v.device)
    return ranks.only_valid((1 - (at[..., None] - columns).abs()).clamp(min=0)[:, None])


def _channels(z: Tensor, w: Weights) -> Tensor:
    """The row linear [B, H * splits, N, width]."""
    rows = F.linear(z, w["row_weight"], w["row_bias"])
    splits = w["conv1_weight"].shape[0] // z.shape[1]
    return rows.unflatten(-1, (splits, -1)).permute(0, 1, 3, 2, 4).flatten(1, 2)


def _causal_decoder(x: Tensor, w: Weights) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], w["row_norm_weight"], w["row_norm_bias"])
    for name in ("conv1", "conv2"):
        x = F.conv2d(F.pad(x, (2, 2, 4, 0)), w[f"{name}_weight"], w[f"{name}_bias"], dilation=2).relu()
    # The 1 x 1 convolution mixes channels and what follows it columns, so that it need not see the columns repeated.
    x = F.conv2d(x, w["out_weight"][:, :, None, None]) @ _repeated_and_averaged(x)
    return F.layer_norm(x + w["out_bias"][:, None, None], x.shape[-1:], w["norm_weight"], w["norm_bias"])


def _repeated_and_averaged(x: Tensor) -> Tensor:
    """[width, K]: every column four times, a zero at both ends, areas of those averaged to K = 4 width columns."""
    width = x.shape[-1]
    columns = torch.eye(width, dtype=x.dtype, device=x.device).repeat_interleave(4, -1)
    return F.adaptive_avg_pool1d(F.pad(columns, (1, 1)), 4 * width)


def _whole_decoder(x: Tensor, w: Weights, ranks: Ranks) -> Tensor:
    def half(y: Tensor) -> Tensor:
        """y with zeros behind the rows that the first half of the tokens has."""
        if ranks.valid is None:
            return y
        behind = torch.arange(y.shape[2], device=y.device) >= (ranks.counts[:, None] + 1) // 2
        return y.masked_fill(behind[:, None, :, None], 0)

    x = half(F.conv2d(ranks.only_valid(x), w["conv1_weight"], w["conv1_bias"], stride=(2, 1), padding=1).relu())
    x = half(F.conv2d(x, w["conv2_weight"], w["conv2_bias"], padding=1).relu())
    x = F.conv2d(x.repeat_interleave(2, 2), w["out_weight"], w["out_bias"], padding=1)
    return _resized_in_time(x @ _doubled_columns(x), ranks)


def _doubled_columns(x: Tensor) -> Tensor:
    """[width, 2 width]: columns interpolated bilinearly between their centres."""
    columns = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return F.interpolate(columns[:, None], scale_factor=2, mode="linear", align_corners=False)[:, 0]


def _resized_in_time(x: Tensor, ranks: Ranks) -> Tensor:
    """Bilinear between the centres of n + 1 rows where an item has an odd number n of tokens, whose row r lies at
    r + (2 r + 1) / (2 n); items of even n have n rows."""
    counts = ranks.counts[:, None]
    share = ((counts % 2) * (2 * ranks.index + 1)).to(x.dtype) / (2 * counts.clamp(min=1))
    share = share[:, None, :, None]
    # indices, as slices of this length would tie an exported program to an odd or even number of tokens
    following = x.index_select(2, (ranks.index + 1).clamp(max=x.shape[2] - 1))
    x = x.index_select(2, ranks.index)
    return x + share * (following - x)
