"""A picture of what a sparse attention attends to, next to exact attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import Array, extent
from .patterns import BlockPattern, CsrPattern, transpose_pattern

__all__ = ["attention_heatmap"]


def attention_heatmap(
    pattern: BlockPattern | CsrPattern,
    q: Array,
    k: Array,
    *,
    heads: Sequence[int] | None = None,
    item: int = 0,
    scale: float | None = None,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    pixels: int = 256,
) -> Any:
    """Draws, for every chosen head, softmax(scale q k^T) on the left and the entries of a pattern on the right.

    pattern: what sea_attention(return_pattern=True) or select_blocks returned, or any CsrPattern [B, H, N, M].
    q [B, H, N, D], k [B, Hkv, M, D]: of any framework, on the CPU. heads: which of H to draw, None: the first four.
    item: which of B. scale: None is D**-0.5. key_mask [B, M], query_mask [B, N] and is_causal: as in the call that made
        the pattern.
    pixels: at most so many rows and columns; a pixel of the left picture is the mean attention of the queries to the
        keys that it stands for together, of the right one the share of its entries that are in the pattern.
    Returns a matplotlib Figure: `.savefig("out.png")`. The title of a head says how many keys a query attends to, and
    what share of its exact attention they hold. Needs matplotlib: pip install subquad[plot].

    Computes the N x M attention of one head at a time.
    """
    op = "attention_heatmap"
    if not isinstance(pattern, (BlockPattern, CsrPattern)):
        raise TypeError(f"[{op}] pattern: expected a BlockPattern or a CsrPattern, got {type(pattern).__name__}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"[{op}] matplotlib: expected to find it, got {error}: pip install subquad[plot]") from None
    csr = pattern.to_csr()
    transpose_pattern(csr)  # which checks the values of a foreign one
    batch, count, seq_q, seq_k = csr.shape
    q, k = _array(q), _array(k)
    _expect_shapes(op, csr.shape, q, k)
    if not extent(op, "item", item, 0) < batch:
        raise ValueError(f"[{op}] item: expected a value in [0, {batch}), got {item}")
    if heads is not None and not hasattr(heads, "__iter__"):
        raise TypeError(f"[{op}] heads: expected a sequence of integers or None, got {type(heads).__name__}")
    chosen = [extent(op, "heads", h, 0) for h in (range(min(count, 4)) if heads is None else heads)]
    if not chosen or max(chosen) >= count or min(seq_q, seq_k) == 0:
        raise ValueError(f"[{op}] heads: expected some in [0, {count}) of a matrix with elements, got {chosen}")
    pixels, scale = extent(op, "pixels", pixels), q.shape[3] ** -0.5 if scale is None else _positive(op, "scale", scale)
    seen = _visible(op, csr.shape, item, key_mask, query_mask, is_causal)
    indptr, indices = np.asarray(csr.indptr), np.asarray(csr.indices)
    figure = Figure(figsize=(6.4, 3.2 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 2, squeeze=False)
    for row, head in zip(axes, chosen, strict=True):
        exact = _attention(q[item, head], k[item, head // (count // k.shape[1])], scale, seen)
        first = (item * count + head) * seq_q
        rows = np.repeat(np.arange(seq_q), np.diff(indptr[first : first + seq_q + 1]))
        member = np.zeros((seq_q, seq_k))
        member[rows, indices[indptr[first] : indptr[first + seq_q]]] = 1
        _draw(row, head, exact, member, pixels)
    return figure


def _expect_shapes(op: str, shape: tuple[int, int, int, int], q: NDArray[Any], k: NDArray[Any]) -> None:
    batch, count, seq_q, seq_k = shape
    if q.ndim != 4 or q.shape[:3] != (batch, count, seq_q):
        raise ValueError(f"[{op}] q: expected shape {[batch, count, seq_q, 'D']} as the pattern's, got {list(q.shape)}")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[2:] != (seq_k, q.shape[3]) or count % max(k.shape[1], 1):
        expected = f"{[batch, 'Hkv', seq_k, q.shape[3]]}, H = {count} a multiple of Hkv"
        raise ValueError(f"[{op}] k: expected shape {expected}, got {list(k.shape)}")


def _positive(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"[{op}] {name}: expected a number, got {type(value).__name__}")
    if not 0 < value < np.inf:
        raise ValueError(f"[{op}] {name}: expected a finite number above 0, got {value}")
    return float(value)


def _visible(
    op: str, shape: tuple[int, int, int, int], item: int, key_mask: Array, query_mask: Array, is_causal: bool
) -> NDArray[Any]:
    """Which keys each query of an item sees, [N, M]."""
    if not isinstance(is_causal, (bool, np.bool_)):
        raise TypeError(f"[{op}] is_causal: expected True or False, got {type(is_causal).__name__}")
    batch, _, seq_q, seq_k = shape
    seen: NDArray[Any] = np.ones((seq_q, seq_k), bool)
    for name, mask, axis in (("key_mask", key_mask, 1), ("query_mask", query_mask, 0)):
        if mask is None:
            continue
        mask = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
        if mask.dtype != bool:
            raise TypeError(f"[{op}] {name}: expected dtype bool, got {mask.dtype}")
        if mask.shape != (batch, seen.shape[axis]):
            raise ValueError(f"[{op}] {name}: expected shape {[batch, seen.shape[axis]]}, got {list(mask.shape)}")
        seen &= np.expand_dims(mask[item], 1 - axis)
    return np.tril(seen, seq_k - seq_q) if is_causal else seen


def _draw(row: Any, head: int, exact: NDArray[Any], member: NDArray[Any], pixels: int) -> None:
    """The two panels of a head."""
    share = (exact * member).sum() / max((exact.sum(axis=1) > 0).sum(), 1)
    row[0].imshow(np.sqrt(_shrunk(exact, pixels)), cmap="magma", aspect="auto", interpolation="nearest")
    row[1].imshow(_shrunk(member, pixels), cmap="magma", aspect="auto", interpolation="nearest", vmin=0)
    row[0].set_title(f"head {head}: exact attention (square root)", fontsize="small")
    row[1].set_title(f"{member.sum() / len(member):.1f} keys a query: {share:.0%} of it", fontsize="small")
    for panel in row:
        panel.set_xticks([])
        panel.set_yticks([])
    row[0].set_ylabel("queries", fontsize="small")
    row[0].set_xlabel("keys", fontsize="small")


def _array(x: Any) -> NDArray[Any]:
    # numpy knows neither torch's bfloat16 nor tensors that require a gradient
    return np.asarray(x.detach().double().cpu() if hasattr(x, "detach") else x, np.float64)


def _attention(q: NDArray[Any], k: NDArray[Any], scale: float, seen: NDArray[Any]) -> NDArray[Any]:
    """Exact softmax attention [N, M]; 0 in rows that see no key."""
    # what sees nothing, and what nothing sees, may hold NaN
    q, k = (np.where(np.logical_or.reduce(seen, axis).reshape(-1, 1), x, 0) for x, axis in ((q, 1), (k, 0)))
    logits = np.where(seen, scale * (q @ k.T), -np.inf)
    weights = np.where(seen, np.exp(logits - np.max(logits, axis=1, initial=-1e300, keepdims=True)), 0.0)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def _shrunk(x: NDArray[Any], pixels: int) -> NDArray[Any]:
    """Means over areas, at most `pixels` of them along either axis."""
    for axis in (0, 1):
        size = x.shape[axis]
        if size > pixels:
            starts = np.arange(pixels) * size // pixels
            widths = np.diff(np.append(starts, size))
            x = np.add.reduceat(x, starts, axis) / (widths[:, None] if axis == 0 else widths)
    return x
