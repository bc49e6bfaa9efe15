"""A small causal transformer over bytes, whose attention may be dense, SEA or RFA, and its training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch import RfaAttention, SeaAttention, sea_losses

BYTES = 256


@dataclass(frozen=True)
class Sizes:
    """Of the models: features of a token, heads, layers, tokens a window; keys a query and columns of SEA; random
    features of RFA."""

    width: int
    heads: int
    layers: int
    context: int
    top_k: int
    columns: int
    features: int


class Teacher(NamedTuple):
    """What a dense attention shows to a student."""

    q: Tensor
    k: Tensor
    context: Tensor


class DenseAttention(nn.Module):
    """Exact causal attention with the projections of the other layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, return_parts: bool = False) -> Any:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out_proj(context.transpose(1, 2).flatten(2))
        return (y, Teacher(q, k, context)) if return_parts else y


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(width), attention
        self.before_mlp, self.dropout = nn.LayerNorm(width), nn.Dropout(0.2)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, return_parts: bool) -> tuple[Tensor, Any]:
        seen = self.before_attention(x)
        y, parts = self.attention(seen, return_parts=True) if return_parts else (self.attention(seen), None)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.before_mlp(x))), parts


class Trace(NamedTuple):
    """What a pass leaves for a loss: the hidden states, the embeddings first, and the parts of every attention."""

    logits: Tensor
    hidden: list[Tensor]
    parts: list[Any]


class LanguageModel(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.token, self.position = nn.Embedding(BYTES, sizes.width), nn.Embedding(sizes.context, sizes.width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.ModuleList(
            Block(sizes.width, DenseAttention(sizes.width, sizes.heads)) for _ in range(sizes.layers)
        )
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, BYTES)

    def forward(self, ids: Tensor, return_parts: bool = False) -> Trace:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        hidden, parts = [x], []
        for block in self.blocks:
            x, part = block(x, return_parts)
            hidden.append(x)
            parts.append(part)
        return Trace(self.head(self.norm(x)), hidden, parts)


def converted(dense: LanguageModel, make: Callable[[int], nn.Module]) -> LanguageModel:
    """A copy whose attentions are those of make(layer), with the projections of the dense ones, and without dropout,
    so that it can follow its teacher."""
    model = copy.deepcopy(dense)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention = make(layer)
        attention.load_state_dict(block.attention.state_dict(), strict=False)
        block.attention, block.dropout.p = attention, 0.0
    return model


def to_sea(dense: LanguageModel, sizes: Sizes, seed: int) -> LanguageModel:
    def make(layer: int) -> nn.Module:
        return SeaAttention(
            sizes.width, sizes.heads, is_causal=True, num_columns=sizes.columns, top_k=sizes.top_k,
            max_positions=sizes.context, seed=seed + 1000 * layer,
        )  # fmt: skip

    return converted(dense, make)


def to_rfa(dense: LanguageModel, sizes: Sizes, seed: int) -> LanguageModel:
    def make(layer: int) -> nn.Module:
        return RfaAttention(
            sizes.width, sizes.heads, is_causal=True, num_features=sizes.features, seed=seed + 1000 * layer
        )

    return converted(dense, make)


def task_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def distillation(student: LanguageModel, dense: LanguageModel, ids: Tensor, with_layers: bool) -> Tensor:
    """The published loss; without the losses of layers for attentions that estimate no matrix."""
    with torch.no_grad():
        teacher = dense(ids, return_parts=True)
    found = student(ids, return_parts=with_layers)
    layers = [torch.zeros(())]
    if with_layers:
        layers = [sea_losses.layer_loss(part, *target) for part, target in zip(found.parts, teacher.parts, strict=True)]
    return sea_losses.distillation_loss(
        layers,
        sea_losses.hidden_loss(found.hidden, teacher.hidden),
        sea_losses.logits_loss(found.logits, teacher.logits),
        task_loss(found.logits, ids),
        is_causal=True,
    )


def train(
    model: LanguageModel,
    loss: Callable[[Tensor], Tensor],
    text: Tensor,
    *,
    steps: int,
    batch: int,
    context: int,
    rate: float,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """AdamW at a constant rate, ten times that for estimators, on windows drawn from the text."""
    generator = torch.Generator().manual_seed(seed)
    fast = [p for name, p in model.named_parameters() if ".estimator." in name]
    rest = [p for name, p in model.named_parameters() if ".estimator." not in name]
    groups = [{"params": params, "lr": lr} for params, lr in ((rest, rate), (fast, 10 * rate)) if params]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(text) - context + 1, (batch,), generator=generator)
        value = loss(text[starts[:, None] + torch.arange(context)])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, value.item())
    model.eval()


@torch.no_grad()
def perplexity(model: LanguageModel, text: Tensor, context: int) -> float:
    """Per byte, over windows that do not overlap."""
    model.eval()
    total, count = 0.0, 0
    for window in text.split(context):
        if len(window) > 1:
            total += task_loss(model(window[None]).logits, window[None]).item() * (len(window) - 1)
            count += len(window) - 1
    return torch.tensor(total / count, dtype=torch.float64).exp().item()
