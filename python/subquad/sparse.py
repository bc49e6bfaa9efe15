"""Sparse attention, and the selection of what it attends to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _ext
from ._arrays import Array, Call
from .patterns import BlockPattern, enter_pattern, indptr_of

__all__ = [
    "select_blocks",
    "sparse_attention",
    "sparse_attention_bwd",
    "topk_select",
    "visible_keys",
]


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    pattern: Any,
    *,
    scale: float | None = None,
    row_scale: Array = None,
    return_lse: bool = False,
    out: Array = None,
) -> Array | tuple[Array, Array]:
    """Softmax attention over the entries of a pattern, in time and memory linear in their number.

        x_e = scale <q_n, k_e> + log_weight_e,    lse_n = ln sum_e e^x_e
        out_n = row_scale_n sum_e e^(x_e - lse_n) v_e

    over the entries e of row (b, h, n). A row without an entry gives 0 and lse -inf.

    q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E]: float32, float16 or bfloat16, H a multiple of Hkv, D and E in
        1..512.
    pattern, one of
        an int32 array of keys [B, 1 | Hkv | H, N, S]: -1 = none, a repeated key counts again;
        a pair (keys, log_weights) of such an array and a float32 one of its shape, -inf allowed: with log_weights of
            -log(expected count) a random sample of keys estimates attention over all of them;
        a CsrPattern or a BlockPattern. One matrix gives the same result in every form.
    scale: a number above 0; None is D**-0.5. row_scale: [B, H, N] float32.
    return_lse: also lse [B, H, N] float32, natural log, without row_scale; `merge_states` joins two pieces by it.
    Returns [B, H, N, E] in the type and dtype of q. Keys outside a row's entries have no effect on it, not even NaN.
    """
    call = Call("sparse_attention", q=q, k=k, v=v)
    batch, heads, seq, _ = call.shape("q", "B H N D")
    parts = enter_pattern(call, pattern, (batch, heads, seq, call.shape("k", "B Hkv M D")[2]))
    keywords = call.keywords({"scale": scale, "row_scale": row_scale}, "row_scale")
    out = call.out(out, (batch, heads, seq, call.shape("v", "B Hkv M E")[3]), "q")
    lse = call.empty((batch, heads, seq), "q", "float32") if call.flag("return_lse", return_lse) else None
    a = call.arrays
    _ext.sparse_attention(a["q"], a["k"], a["v"], parts, keywords, out, lse)
    return call.leave(out) if lse is None else call.leave(out, lse)


def sparse_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    pattern: Any,
    *,
    scale: float | None = None,
    row_scale: Array = None,
    dlse: Array = None,
    out: Array = None,
    lse: Array = None,
) -> tuple[Array, ...]:
    """Gradients dq, dk, dv of sparse_attention, and drow_scale [B, H, N] if row_scale is given, for dout [B, H, N, E]
    and optionally dlse [B, H, N] float32.

    The pattern and its log_weights are constants. Deterministic: every key adds up its own entries in order, without
    atomics. out and lse of the forward pass may be given; only their shapes are looked at, for both are formed again.
    """
    call = Call("sparse_attention_bwd", q=q, k=k, v=v, dout=dout, dlse=dlse)
    batch, heads, seq, _ = call.shape("q", "B H N D")
    seq_k = call.shape("k", "B Hkv M D")[2]
    parts = enter_pattern(call, pattern, (batch, heads, seq, seq_k))
    check_saved(call, out, lse)
    keywords = call.keywords({"scale": scale, "row_scale": row_scale, "max_entries": 0}, "row_scale")
    if parts["bits"] is not None:
        keywords["max_entries"] = int(indptr_of(call, parts, seq_k)[-1])
    dq, dk, dv = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k", "v"))
    drow = None if row_scale is None else call.empty((batch, heads, seq), "q", "float32")
    a = call.arrays
    _ext.sparse_attention_bwd(a["dout"], a["dlse"], a["q"], a["k"], a["v"], parts, keywords, dq, dk, dv, drow)
    return call.leave(dq, dk, dv) if drow is None else call.leave(dq, dk, dv, drow)


def check_saved(call: Call, out: Array, lse: Array) -> None:
    """Checks what a forward pass returned, for a backward pass that does not need it."""
    batch, heads, seq, _ = call.shape("q", "B H N D")
    shapes = {"out": (batch, heads, seq, call.shape("v", "B H M E")[3]), "lse": (batch, heads, seq)}
    for name, x, axes in (("out", out, "[B, H, N, E]"), ("lse", lse, "[B, H, N]")):
        x = call.enter(name, x)
        if x is not None and tuple(x.shape) != shapes[name]:
            raise ValueError(f"[{call.op}] {name}: expected shape {axes} = {list(shapes[name])}, got {list(x.shape)}")


def topk_select(
    scores: Array,
    k: int,
    *,
    group: str = "query",
    key_mask: Array = None,
    is_causal: bool = False,
    out: Array = None,
) -> Array:
    """The k largest scores of every group, by a threshold instead of a sort.

    scores: [B, H, N, M] float32, float16 or bfloat16. Candidates are the keys m kept by key_mask [B, M] bool, with
        is_causal those of them with m <= n + (M - N).
    group: what competes with what, and the shape of the result and its flat indices:
        "query" [B, H, N, k]: m;   "row_heads" [B, N, k]: h * M + m;   "head" [B, H, k]: n * M + m;
        "batch" [B, k]: (h * N + n) * M + m
    Returns int32, ascending; -1 behind the last where a group has fewer than k candidates. The larger value comes
    first; ties (-0 = +0) go to the lower index, on every device; NaN ranks last, below -inf. With group="query" the
    result is a pattern of sparse_attention.
    """
    call = Call("topk_select", scores=scores)
    batch, heads, seq, _ = call.shape("scores", "B H N M")
    k = call.extent("k", k)
    groups = {"query": (batch, heads, seq), "row_heads": (batch, seq), "head": (batch, heads), "batch": (batch,)}
    shape = groups.get(group) if isinstance(group, str) else None
    if shape is None:
        choices = " or ".join(f'"{name}"' for name in groups)
        if not isinstance(group, str):
            raise TypeError(f"[topk_select] group: expected {choices}, got {type(group).__name__}")
        raise ValueError(f'[topk_select] group: expected {choices}, got "{group}"')
    indices = call.out(out, (*shape, k), "scores", "int32")
    keywords = {"k": k, "group": group, "key_mask": key_mask, "is_causal": is_causal}
    try:
        _ext.topk_select(call.arrays["scores"], call.keywords(keywords, "key_mask"), indices)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("] indices: ", "] out: ", 1)) from None
    return call.leave(indices)


def visible_keys(
    key_mask: Array = None,
    query_mask: Array = None,
    *,
    batch: int | None = None,
    num_queries: int | None = None,
    num_keys: int | None = None,
    is_causal: bool = False,
) -> tuple[Array, Array]:
    """How many keys every query sees, and which key is the r-th valid one.

    key_mask [B, M], query_mask [B, N]: bool, True = keep. batch, num_queries, num_keys: the extents B, N, M that no
    mask has; without any mask the results are numpy arrays.
    Returns counts [B, N] int32, the number of valid keys m of the item, with is_causal of those with m <= n + (M - N),
    0 for a masked query; and positions [B, M] int32, -1 behind the last valid key.
    """
    given = {"key_mask": key_mask, "query_mask": query_mask}
    call = Call("visible_keys", **({n: x for n, x in given.items() if x is not None} or {"": np.empty(0)}))
    extents: dict[str, Any] = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    for name, length in (("key_mask", "num_keys"), ("query_mask", "num_queries")):
        if given[name] is not None:
            for axis, extent in zip(("batch", length), call.shape(name, "B tokens"), strict=True):
                extents[axis] = extent if extents[axis] is None else extents[axis]
    for name, value in extents.items():
        if value is None:
            raise TypeError(f"[visible_keys] {name}: expected an integer where no mask has it, got None")
        extents[name] = call.extent(name, value, 0)
    like = next(iter(call.arrays))
    positions = call.empty((extents["batch"], extents["num_keys"]), like, "int32")
    counts = call.empty((extents["batch"], extents["num_queries"]), like, "int32")
    masks = (call.arrays.get("key_mask"), call.arrays.get("query_mask"))
    _ext.visible_keys(call.op, *masks, is_causal, extents["num_keys"], counts, positions)
    return call.leave(counts, positions)


def visible_of(
    call: Call, like: str, num_keys: int, key_mask: Array, query_mask: Array, is_causal: bool
) -> tuple[Array, Array]:
    """visible_keys for argument `like` [B, H, N, ...] of a call; positions are None without a key_mask."""
    batch, _, seq = call.arrays[like].shape[:3]
    key_mask, query_mask = call.enter("key_mask", key_mask), call.enter("query_mask", query_mask)
    counts = call.empty((batch, seq), like, "int32")
    positions = None if key_mask is None else call.empty((batch, num_keys), like, "int32")
    call.run(_ext.visible_keys, call.op, key_mask, query_mask, is_causal, num_keys, counts, positions)
    return counts, positions


def select_blocks(
    probs: Array,
    *,
    top_k: float = 64,
    group: str = "row_heads",
    num_keys: int | None = None,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    budget: str = "code",
    block_cap: int | None = None,
    skip_dead: bool = False,
) -> BlockPattern:
    """The columns of an estimated attention probs [B, H, N, K] float32 that SEA attends to, as a BlockPattern.

    A column of a row that sees n keys stands for about n / K of them, so that top_k keys are selected per query and
    head on average. The largest probabilities of every group win, as many as its budget (rhe: rounded half to even of
    the exact quotient), at least 1 and at most the candidates; NaN last, ties to the lower index:
        budget="code" (the published code): "query" rhe(k K / n), "head" rhe(k K), "batch" rhe(H k K),
            "row_heads" rhe(H k K / n)
        budget="paper" (its text): r(n) = max(1, rhe(k K / n)); "query" r(n), "row_heads" H r(n), "head" the sum of r(n)
            over its rows, "batch" H times that
    group: what competes: the columns of a "query", of a "head" (all queries), of the "batch" item (all heads and
        queries), or of one query over all heads ("row_heads"); "head" and "batch" let queries depend on each other, and
        are not for is_causal.
    top_k: at least 1, may be a fraction. num_keys: M, default that of key_mask, else N.
    key_mask [B, M], query_mask [B, N]: bool, True = keep. is_causal: query n sees keys m <= n + (M - N).
    block_cap: at most so many keys, the newest, of a selected column; default ceil(top_k).
    skip_dead: columns of no key (n < K) do not compete.
    """
    op = "select_blocks"
    call = Call(op, probs=probs, key_mask=key_mask)
    batch, heads, seq, columns = call.shape("probs", "B H N K")
    if num_keys is None:
        num_keys = seq if key_mask is None else call.shape("key_mask", "B M")[1]
    num_keys = call.extent("num_keys", num_keys, 0)
    if call.flag("is_causal", is_causal) and group in ("head", "batch"):
        raise ValueError(f'[{op}] group: expected "query" or "row_heads" with is_causal=True, got "{group}"')
    keywords = {"top_k": top_k, "group": group, "budget": budget, "skip_dead": skip_dead}
    bits = call.empty((batch, heads, seq, -(-columns // 8)), "probs", "uint8")
    visible, positions = visible_of(call, "probs", num_keys, key_mask, query_mask, is_causal)
    _ext.select_blocks(call.arrays["probs"], visible, keywords, bits)
    return block_pattern(call, [bits, visible, positions], columns, block_cap, top_k, num_keys)


def block_pattern(call: Call, made: list[Array], columns: int, cap: Any, top_k: Any, num_keys: int) -> BlockPattern:
    """The pattern whose bits, visible and positions a selection has written."""
    bits, visible, positions = (None if x is None else call.leave(x) for x in made)
    cap = cap_of(None if cap is None else call.extent("block_cap", cap), top_k)
    return BlockPattern(bits, columns, visible, cap, positions, num_keys)


def cap_of(block_cap: int | None, top_k: float) -> int:
    """The most keys of a selected column."""
    return math.ceil(min(top_k, 2**31 - 1)) if block_cap is None else block_cap
