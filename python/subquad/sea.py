"""SEA: sparse attention where an estimate of the attention matrix says that it matters; the estimator, and contexts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _ext
from ._arrays import Array, Call
from .sparse import block_pattern, check_saved

__all__ = [
    "block_pool",
    "block_pool_bwd",
    "running_mean",
    "running_mean_bwd",
    "sea_attention",
    "sea_attention_bwd",
    "sea_estimate",
]

_SEA_ARRAYS = ("row_scale", "mix", "context", "key_mask", "query_mask")
_STATE = ("s", "z", "rows1", "rows2", "count")
_MEAN_STATE = ("sum", "count")
WEIGHTS = (
    "projection", "encoder_weight", "encoder_bias", "encoder_norm_weight", "encoder_norm_bias", "scaler_weight",
    "scaler_bias", "row_weight", "row_bias", "conv1_weight", "conv1_bias", "conv2_weight", "conv2_bias", "out_weight",
    "out_bias",
)  # fmt: skip
CAUSAL_WEIGHTS = ("position", "row_norm_weight", "row_norm_bias", "norm_weight", "norm_bias")


def sea_attention(
    q: Array,
    k: Array,
    v: Array,
    probs: Array,
    *,
    top_k: float = 64,
    group: str = "row_heads",
    scale: float | None = None,
    row_scale: Array = None,
    mix: Array = None,
    context: Array = None,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    budget: str = "code",
    block_cap: int | None = None,
    return_lse: bool = False,
    return_pattern: bool = False,
    out: Array = None,
) -> Any:
    """SEA: sparse attention with an estimated attention mask (Lee et al., ICLR 2024), in time linear in N and M.

        out_n = mix_n row_scale_n sum_e softmax_e(scale <q_n, k_e>) v_e + (1 - mix_n) context_n

    over the keys e of the columns of probs that select_blocks selects. With top_k as large as the number of keys the
    sparse part is exact attention. Otherwise what is not selected is missing, and only the context stands for it: as
    good as the estimate, which `sea_estimate` makes from trained weights.

    q [B, H, N, D], k [B, H, M, D], v [B, H, M, E]: float32, float16 or bfloat16. probs: [B, H, N, K] float32, the
        estimated attention on K columns, each of which stands for a K-th of the keys that its row sees: made with the
        same masks and is_causal.
    top_k, group, budget, block_cap: as in select_blocks. scale: a number above 0; None is D**-0.5.
    row_scale, mix: [B, H, N] float32; None is 1, and no context. context: [B, H, N, E] or [B, H, 1, E], float32 or like
        v, with mix only; None is the running mean of v (causal) or its pool by columns (block_pool).
    key_mask [B, M], query_mask [B, N]: bool, True = keep; a masked key may hold NaN, a masked query gives 0. Rows count
        the valid keys that they see, so that padding, also on the left or in between, changes nothing.
    is_causal: query n sees keys m <= n + (M - N).
    return_lse: also lse [B, H, N] float32. return_pattern: also the selected keys, a BlockPattern.
    Returns [B, H, N, E] in the type and dtype of q, then lse and pattern.
    """
    call = Call("sea_attention", q=q, k=k, v=v, probs=probs)
    keywords = _sea_keywords(
        call, top_k, group, scale, row_scale, mix, context, key_mask, query_mask, is_causal, budget, block_cap
    )
    batch, heads, seq, _ = call.shape("q", "B H N D")
    seq_k, columns = call.shape("k", "B H M D")[2], call.shape("probs", "B H N K")[3]
    out = call.out(out, (batch, heads, seq, call.shape("v", "B H M E")[3]), "q")
    lse = call.empty((batch, heads, seq), "q", "float32") if call.flag("return_lse", return_lse) else None
    made: list[Array] = [None, None, None]
    if call.flag("return_pattern", return_pattern):
        made[0] = call.empty((batch, heads, seq, -(-columns // 8)), "q", "uint8")
        made[1] = call.empty((batch, seq), "q", "int32")
        made[2] = None if key_mask is None else call.empty((batch, seq_k), "q", "int32")
    a = call.arrays
    _ext.sea_attention(a["q"], a["k"], a["v"], a["probs"], keywords, out, lse, made)
    results = [call.leave(x) for x in (out, lse) if x is not None]
    if made[0] is not None:
        results.append(block_pattern(call, made, columns, block_cap, top_k, seq_k))
    return results[0] if len(results) == 1 else tuple(results)


def sea_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    probs: Array,
    *,
    top_k: float = 64,
    group: str = "row_heads",
    scale: float | None = None,
    row_scale: Array = None,
    mix: Array = None,
    context: Array = None,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    budget: str = "code",
    block_cap: int | None = None,
    dlse: Array = None,
    out: Array = None,
    lse: Array = None,
) -> tuple[Array, ...]:
    """Gradients dq, dk, dv, dprobs of sea_attention for dout [B, H, N, E], and drow_scale, dmix, dcontext for those
    that are given.

    The selection is a constant: dprobs [B, H, N, K] float32 is 0 but for the pooled context, and an estimate is trained
    by losses of its own (teacher_blocks). dlse [B, H, N] float32. Of out and lse only the shapes are looked at.
    """
    call = Call("sea_attention_bwd", q=q, k=k, v=v, probs=probs, dout=dout, dlse=dlse)
    keywords = _sea_keywords(
        call, top_k, group, scale, row_scale, mix, context, key_mask, query_mask, is_causal, budget, block_cap
    )
    check_saved(call, out, lse)
    a = call.arrays
    dq, dk, dv = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k", "v"))
    shape = call.shape("probs", "B H N K")
    pooled = mix is not None and context is None and not call.flag("is_causal", is_causal)
    dprobs = call.empty(shape, "q", "float32")
    if not pooled:
        dprobs[...] = 0
    extra = []
    for name in ("row_scale", "mix", "context"):
        x = keywords[name]
        extra.append(None if x is None else call.framework.empty(tuple(x.shape), None, x))
    _ext.sea_attention_bwd(
        a["dout"], a["dlse"], a["q"], a["k"], a["v"], a["probs"], keywords, dq, dk, dv, dprobs if pooled else None,
        *extra,
    )  # fmt: skip
    return call.leave(dq, dk, dv, dprobs, *(x for x in extra if x is not None))


def _sea_keywords(call: Call, *values: Any) -> dict[str, Any]:
    """The keywords of sea_attention as the compiled module takes them, from their values in its order."""
    names = (
        "top_k", "group", "scale", "row_scale", "mix", "context", "key_mask", "query_mask", "is_causal", "budget",
        "block_cap",
    )  # fmt: skip
    return call.keywords(dict(zip(names, values, strict=True)) | {"skip_dead": False}, *_SEA_ARRAYS)


def sea_estimate(
    q: Array,
    k: Array,
    v: Array,
    weights: Mapping[str, Array],
    *,
    is_causal: bool = False,
    key_mask: Array = None,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Any, ...]:
    """SEA's estimate of softmax attention from trained weights, in time linear in N: probs [B, H, N, K], row_scale and
    mix [B, H, N], what sea_attention takes; all float32.

    Linear attention with random features, a shared MLP, convolutions over queries and columns, and a softmax over K
    columns. `subquad.torch.SeaAttention` trains the weights; its `estimator.weights()` is the mapping that this takes.

    q, k, v: [B, H, N, D] float32, float16 or bfloat16, of one sequence.
    weights: float32 arrays by name; d = D, m features, C = 2 H channels of w = K / 4 columns if causal, else C = 4 H of
        w = K / 2:
        projection [m, d]; encoder_weight [2d, 3d], encoder_bias [2d], encoder_norm_weight and _bias [2d];
        scaler_weight [2, 2d] (rows: row_scale, mix), scaler_bias [2]; row_weight [w C / H, 2d], row_bias [w C / H];
        conv1_weight and conv2_weight [C, C, 3, 3] (output, input, time, column), conv1_bias and conv2_bias [C];
        causal: position [P, d] with P at least the number of tokens, row_norm_weight and _bias [w], out_weight [H, C],
        out_bias [H], norm_weight and _bias [K]; bidirectional: out_weight [H, C, 3, 3], out_bias [H].
    key_mask: [B, N] bool, True = keep. A masked token has no effect, and its rows are 0. Positions, taps and lengths
        count valid tokens, so that padding changes nothing.
    state, return_state (causal): (s, z, rows1, rows2, count); prefill and then decoding with the state, in pieces of
        any length, equals one call. Returned behind mix.
    """
    call = Call("sea_estimate", q=q, k=k, v=v)
    batch, heads, seq, dim = call.shape("q", "B H N D")
    is_causal = call.flag("is_causal", is_causal)
    parts = _weights(call, weights, is_causal)
    before = _state_parts(call, state, _STATE)
    if state is not None and not is_causal:
        raise ValueError(f"[{call.op}] state: expected none unless is_causal, got a state")
    keywords = call.keywords({"is_causal": is_causal, "key_mask": key_mask}, "key_mask")
    columns, features = _extents(parts, is_causal)
    probs = call.empty((batch, heads, seq, columns), "q", "float32")
    row_scale, mix = (call.empty((batch, heads, seq), "q", "float32") for _ in range(2))
    behind: list[Array] = [None] * len(_STATE)
    if call.wants_state(return_state, is_causal):
        shapes = [(batch, heads, features, 2 * dim), (batch, heads, features)]
        shapes += [(batch, 2 * heads, 4, columns // 4)] * 2
        behind = [call.empty(shape, "q", "float32") for shape in shapes] + [call.empty((batch,), "q", "int32")]
    a = call.arrays
    _ext.sea_estimate(a["q"], a["k"], a["v"], parts, keywords, before, probs, row_scale, mix, behind)
    results = call.leave(probs, row_scale, mix)
    return results if behind[0] is None else (*results, tuple(call.leave(x) for x in behind))


def check_weights(op: str, weights: Any, is_causal: bool) -> None:
    """Checks that `weights` is a mapping with the names of one kind of decoder and no others."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"[{op}] weights: expected a mapping of names to arrays, got {type(weights).__name__}")
    wanted = WEIGHTS + (CAUSAL_WEIGHTS if is_causal else ())
    kind = "is_causal=True" if is_causal else "is_causal=False"
    for name in wanted:
        if weights.get(name) is None:
            raise ValueError(f"[{op}] weights: expected {name} among them with {kind}, got none")
    for name in weights:
        if name not in wanted:
            raise ValueError(f"[{op}] weights: expected only {', '.join(wanted)} with {kind}, got {name!r}")


def _weights(call: Call, weights: Any, is_causal: bool) -> dict[str, Any]:
    """The weights as the compiled module takes them: all names, those of the other kind of decoder None."""
    check_weights(call.op, weights, is_causal)
    return {name: call.enter(name, weights.get(name)) for name in (*WEIGHTS, *CAUSAL_WEIGHTS)}


def _extents(parts: dict[str, Any], is_causal: bool) -> tuple[int, int]:
    """K and the number of features; arrays of another rank are the core's to refuse."""
    columns = parts["norm_weight"].shape[:1] if is_causal else parts["row_bias"].shape[:1]
    count = columns[0] if columns else 0
    return (count if is_causal else count // 2), (parts["projection"].shape[0] if parts["projection"].ndim else 0)


def _state_parts(call: Call, state: Any, names: tuple[str, ...]) -> list[Array]:
    """The arrays of a state as the compiled module takes them; None each without one."""
    parts = dict(zip(names, call.state(state, names), strict=True))
    for name, part in parts.items():
        if state is not None and part is None:
            raise TypeError(f"[{call.op}] state {name}: expected an array, got None")
    return [call.enter(f"state {name}", part) for name, part in parts.items()]


def running_mean(
    v: Array,
    *,
    num_queries: int | None = None,
    key_mask: Array = None,
    state: tuple[Array, Array] | None = None,
    return_state: bool = False,
    out: Array = None,
) -> Any:
    """The mean of the values seen so far: out_n = mean of the valid v_m with m <= n + (M - N), 0 before the first.

    v: [B, H, M, E] float32, float16 or bfloat16. num_queries: N, default M. key_mask: [B, M] bool, True = keep; a
    masked value may hold NaN. state, return_state: (sum [B, H, E] float32, count [B] int32) of the values before and
    behind, so that pieces of any length give what one call gives. Returns [B, H, N, E] like v, then the state.
    """
    call = Call("running_mean", v=v)
    batch, heads, seq, dim = call.shape("v", "B H M E")
    num_queries = seq if num_queries is None else call.extent("num_queries", num_queries, 0)
    before, key_mask = _state_parts(call, state, _MEAN_STATE), call.enter("key_mask", key_mask)
    out = call.out(out, (batch, heads, num_queries, dim), "v")
    if tuple(out.shape) != (batch, heads, num_queries, dim):
        expected = f"[B, H, N, E] = {[batch, heads, num_queries, dim]}"
        raise ValueError(f"[{call.op}] out: expected shape {expected}, got {list(out.shape)}")
    behind: list[Array] = [None] * len(_MEAN_STATE)
    if call.flag("return_state", return_state):
        behind = [call.empty((batch, heads, dim), "v", "float32"), call.empty((batch,), "v", "int32")]
    _ext.running_mean(call.arrays["v"], key_mask, before, out, behind)
    return call.leave(out) if behind[0] is None else (call.leave(out), tuple(call.leave(x) for x in behind))


def running_mean_bwd(
    dout: Array,
    v: Array,
    *,
    num_queries: int | None = None,
    key_mask: Array = None,
    state: tuple[Array, Array] | None = None,
) -> Array:
    """Gradient dv of running_mean for dout [B, H, N, E]: dv_m = sum over n, m <= n + (M - N), of dout_n / count_n."""
    call = Call("running_mean_bwd", v=v, dout=dout)
    call.shape("v", "B H M E")
    seq = call.shape("dout", "B H N E")[2]
    if num_queries is not None and call.extent("num_queries", num_queries, 0) != seq:
        raise ValueError(f"[{call.op}] num_queries: expected N = {seq} of dout, got {num_queries}")
    before, key_mask = _state_parts(call, state, _MEAN_STATE), call.enter("key_mask", key_mask)
    dv = call.empty(call.shape("v", "B H M E"), "v")
    _ext.running_mean_bwd(call.arrays["dout"], call.arrays["v"], key_mask, before, dv)
    return call.leave(dv)


def block_pool(v: Array, probs: Array, *, key_mask: Array = None, query_mask: Array = None, out: Array = None) -> Array:
    """The values weighted by how much attention their columns get on average: one vector per head, [B, H, 1, E].

        i_c = mean over the kept queries of probs_nc,    out = sum over the n valid keys, of rank r, of i_col(r) v

    with col(r) = ((2 r + 1) K - 1) // (2 n). Not normalised: the weights sum to about n / K. 0 where nothing is kept.

    v: [B, H, M, E] float32, float16 or bfloat16. probs: [B, H, N, K] float32. key_mask [B, M], query_mask [B, N]: bool,
    True = keep; what is masked may hold NaN.
    """
    call = Call("block_pool", v=v, probs=probs)
    batch, heads, _, dim = call.shape("v", "B H M E")
    call.shape("probs", "B H N K")
    key_mask, query_mask = call.enter("key_mask", key_mask), call.enter("query_mask", query_mask)
    out = call.out(out, (batch, heads, 1, dim), "v")
    _ext.block_pool(call.arrays["v"], call.arrays["probs"], key_mask, query_mask, out)
    return call.leave(out)


def block_pool_bwd(
    dout: Array, v: Array, probs: Array, *, key_mask: Array = None, query_mask: Array = None
) -> tuple[Array, Array]:
    """Gradients dv, dprobs of block_pool for dout [B, H, 1, E]."""
    call = Call("block_pool_bwd", v=v, probs=probs, dout=dout)
    key_mask, query_mask = call.enter("key_mask", key_mask), call.enter("query_mask", query_mask)
    dv = call.empty(call.shape("v", "B H M E"), "v")
    dprobs = call.empty(call.shape("probs", "B H N K"), "probs")
    a = call.arrays
    _ext.block_pool_bwd(a["dout"], a["v"], a["probs"], key_mask, query_mask, dv, dprobs)
    return call.leave(dv, dprobs)
