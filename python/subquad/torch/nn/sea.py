"""The layer of attention on an estimated mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import subquad

from ..sparse import sea_attention, sea_estimate
from ._layer import SelfAttention
from .sea_estimator import SeaEstimator
from .sea_state import SeaState, extended

__all__ = ["SeaAttention", "SeaParts"]

_GROUPS = ("query", "row_heads", "head", "batch")


class SeaParts(NamedTuple):
    """What the losses of `subquad.torch.sea_losses` compare: q, k [B, H, N, D]; scores [B, H, N, K], the logits of the
    compressed attention matrix; context [B, H, N, D], the heads before they are merged; is_causal and key_mask."""

    q: Tensor
    k: Tensor
    scores: Tensor
    context: Tensor
    is_causal: bool
    key_mask: Tensor | None


class SeaAttention(SelfAttention):
    """Multi-head self-attention on an estimated mask (SEA): exact on about top_k keys a query, a mean elsewhere.

        q, k, v = x Wq, x Wk, x Wv, split into heads
        A, r, m = estimator(q, k, v): for each query a distribution over K blocks of keys, and two numbers in (0, 1)
        y_n     = m_n r_n softmax attention over the keys of the best blocks of A + (1 - m_n) c_n, merged, times Wo

    with c the running mean of the values if causal, else their mean with the weights of A; the formulas are in
    `subquad.sea_estimate` and `subquad.sea_attention`. Time and memory are linear in the length. The defaults are those
    published for language models (causal: K = top_k = 64) and for encoders (K = 128, top_k = 7).
    Source: Lee et al., ICLR 2024.

    The mask has no gradient: without the losses of `subquad.torch.sea_losses`, which compare A with the attention of a
    teacher, a causal estimator does not learn where to look. Passes that need gradients, and all in training, run the
    estimator in torch; others run `subquad.sea_estimate`. A draw of new random features comes with the steps of an
    optimizer, see `SeaEstimator`; no other state changes in a pass.

    When not to use it:
      - without a trained dense model to learn from: it is made to take the place of the attention of one;
      - for short sequences: the estimator costs more than exact attention on some thousand keys.

    Where it differs on purpose from the published code [their way]:
      - positions, convolutions and lengths count the valid tokens of an item, also behind a state: padding, chunks and
        decoding change nothing [padding enters denominators and causal masks; decoding differs from training];
      - a block gives its newest block_cap tokens, in training too [a stretched choice, only outside training];
      - ties go to the lower index, and budgets are rounded from exact fractions [by float32];
      - the projection is Haar distributed [QR without the sign fix].

    Args:
        embed_dim: C, the features of a token.
        num_heads: H; keys and values have as many.
        head_dim: D, default embed_dim / num_heads.
        is_causal: token n sees tokens m <= n. Also chooses the estimator and the defaults.
        num_columns, num_features, max_positions, redraw_interval: see `SeaEstimator`.
        top_k: keys a query attends to, on average over the heads; default 64 (causal) or 7. May be set at any time.
        group, budget, block_cap: see `subquad.sea_attention`.
        bias: whether the projections have one.
        seed: of the random features.

    Shape: x [B, N, C] and key_mask [B, N] bool, True = keep -> [B, N, C]. A masked token is not seen and sees nothing.
    State: {q,k,v,out}_proj.{weight,bias}; estimator.*: the weights of `subquad.sea_estimate` by its names, and seed.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        is_causal: bool = False,
        num_columns: int | None = None,
        top_k: float | None = None,
        group: str = "row_heads",
        num_features: int | None = None,
        max_positions: int = 2048,
        budget: str = "code",
        block_cap: int | None = None,
        redraw_interval: int | None = 1000,
        bias: bool = True,
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(embed_dim, num_heads, None, head_dim, bias, None, device, dtype)
        top_k = (64 if is_causal else 7) if top_k is None else top_k
        self._expect(top_k >= 1, "top_k", "a value of at least 1", top_k)
        self._expect_one_of("group", _GROUPS[:2] if is_causal else _GROUPS, group)
        self._expect_one_of("budget", ("code", "paper"), budget)
        self._expect(block_cap is None or block_cap >= 1, "block_cap", "None or at least 1", block_cap)
        self.is_causal, self.top_k, self.group, self.budget, self.block_cap = is_causal, top_k, group, budget, block_cap
        self.estimator = SeaEstimator(
            num_heads, self.head_dim, is_causal=is_causal, num_columns=num_columns, num_features=num_features,
            max_positions=max_positions, redraw_interval=redraw_interval, seed=seed, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        state: SeaState | None = None,
        return_state: bool = False,
        return_parts: bool = False,
    ) -> Any:
        """y [B, N, C], with return_state or return_parts followed by that.

        state, return_state (causal): for decoding. A call cut in two, with the state handed on, equals one call; such
            calls have no gradients, and run under torch.no_grad.
        return_parts: what `subquad.torch.sea_losses` takes.
        """
        if key_mask is not None:
            x = x.masked_fill(~key_mask[..., None], 0)
        q, k, v = self._heads(x)
        if state is not None or return_state:
            self._expect(not return_parts, "return_parts", "False with a state", return_parts)
            name, value = ("return_state", return_state) if state is None else ("state", "a state")
            self._expect(self.is_causal, name, "is_causal=True with it", value)
            out, state = self._continued(q, k, v, key_mask, state)
            y = self._merged(out)
            return (y, state) if return_state else y
        scores, probs, row_scale, mix = self._estimate(q, k, v, key_mask, return_parts)
        out = self._attend(q, k, v, probs, row_scale, mix, key_mask=key_mask, query_mask=key_mask)
        y = self._merged(out)
        return (y, SeaParts(q, k, scores, out, self.is_causal, key_mask)) if return_parts else y

    def _estimate(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, with_scores: bool) -> Any:
        if self.training or with_scores or self._differentiates(q, k, v):
            return self.estimator(q, k, v, key_mask)
        weights = self.estimator.weights()
        return None, *sea_estimate(q, k, v, weights, is_causal=self.is_causal, key_mask=key_mask)

    def _differentiates(self, *inputs: Tensor) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *self.estimator.parameters()))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, probs: Tensor, row_scale: Tensor, mix: Tensor, **more: Any
    ) -> Any:
        return sea_attention(
            q, k, v, probs, row_scale=row_scale, mix=mix, is_causal=self.is_causal, top_k=self.top_k, group=self.group,
            budget=self.budget, block_cap=self.block_cap, **more,
        )  # fmt: skip

    def _continued(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: SeaState | None
    ) -> tuple[Tensor, SeaState]:
        if state is not None and not isinstance(state, SeaState):
            raise TypeError(f"[SeaAttention] state: expected None or a SeaState, got {type(state).__name__}")
        if self._differentiates(q, k, v):
            raise RuntimeError(
                "[SeaAttention] state: expected a call under torch.no_grad(), as states are not differentiated, got "
                "one that records gradients"
            )
        before: tuple[Any, Any] = (None, None) if state is None else (state.estimate, state.mean)
        *estimated, estimate = sea_estimate(
            q, k, v, self.estimator.weights(), is_causal=True, key_mask=mask, state=before[0], return_state=True
        )
        context, mean = subquad.running_mean(v, key_mask=mask, state=before[1], return_state=True)
        cache = extended(state, k, v, mask)
        keys, values, key_mask = cache.tokens(cache.used)
        out = self._attend(q, keys, values, *estimated, context=context, key_mask=key_mask, query_mask=mask)
        return out, SeaState(cache.used, estimate, mean, cache)

    def _described(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("is_causal", "top_k", "group", "budget", "block_cap")}
