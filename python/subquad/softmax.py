"""Exact softmax attention, and operators that cut, merge and sample it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _ext
from ._arrays import Array, Call

__all__ = [
    "merge_states",
    "merge_states_bwd",
    "row_dot",
    "segment_mean",
    "segment_mean_bwd",
    "softmax_attention",
    "softmax_attention_bwd",
    "softmax_sample",
    "sum_arrays",
]


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    key_bias: Array = None,
    key_mask: Array = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
    out: Array = None,
) -> Array | tuple[Array, Array]:
    """Exact attention in one pass over the keys, in memory O(N + M).

        x_nm = scale <q_n, k_m> + key_bias_m,    lse_n = ln sum_m e^x_nm,    out_n = sum_m e^(x_nm - lse_n) v_m

    over the keys m that query n sees. A query that sees none gives 0 and lse -inf.

    q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E]: float32, float16 or bfloat16, H a multiple of Hkv, D and E in
        1..512; any strides with a contiguous last axis.
    scale: a number above 0; None is D**-0.5.
    key_bias: [B, 1, M], [B, Hkv, M] or [B, H, M] float32, -inf allowed. key_mask: [B, M] bool, True = keep; a masked
        key may hold NaN.
    is_causal: query n sees keys m <= n + (M - N). window=(left, right): keys n + (M - N) - left .. n + (M - N) + right,
        -1 = unbounded.
    return_lse: also return lse [B, H, N] float32, natural log.
    Returns [B, H, N, E] in the type and dtype of q. What a query does not see does not change a bit of its row.
    """
    keywords = {"scale": scale, "key_bias": key_bias, "key_mask": key_mask, "is_causal": is_causal, "window": window}
    call = Call("softmax_attention", q=q, k=k, v=v)
    batch, heads, seq, _ = call.shape("q", "B H N D")
    call.shape("k", "B Hkv M D")
    out = call.out(out, (batch, heads, seq, call.shape("v", "B Hkv M E")[3]), "q")
    lse = call.empty((batch, heads, seq), "q", "float32") if call.flag("return_lse", return_lse) else None
    a = call.arrays
    _ext.softmax_attention(a["q"], a["k"], a["v"], call.keywords(keywords, "key_bias", "key_mask"), out, lse)
    return call.leave(out) if lse is None else call.leave(out, lse)


def softmax_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    key_bias: Array = None,
    key_mask: Array = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dlse: Array = None,
    out: Array = None,
    lse: Array = None,
) -> tuple[Array, ...]:
    """Gradients dq, dk, dv of softmax_attention, and dkey_bias if key_bias is given, for dout [B, H, N, E] and
    optionally dlse [B, H, N] float32.

    out and lse: what the forward pass returned; without both of them they are formed again.
    """
    keywords = {"scale": scale, "key_bias": key_bias, "key_mask": key_mask, "is_causal": is_causal, "window": window}
    call = Call("softmax_attention_bwd", q=q, k=k, v=v, dout=dout, dlse=dlse, out=out, lse=lse, key_bias=key_bias)
    call.shape("dout", "B H N E")
    dq, dk, dv = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k", "v"))
    dbias = None if key_bias is None else call.empty(call.shape("key_bias", "B H M"), "q", "float32")
    a = call.arrays
    _ext.softmax_attention_bwd(
        a["dout"], a["dlse"], a["q"], a["k"], a["v"], call.keywords(keywords, "key_bias", "key_mask"), a["out"],
        a["lse"], dq, dk, dv, dbias,
    )  # fmt: skip
    return call.leave(dq, dk, dv) if dbias is None else call.leave(dq, dk, dv, dbias)


def merge_states(out1: Array, lse1: Array, out2: Array, lse2: Array) -> tuple[Array, Array]:
    """Attention over the union of two disjoint sets of keys, from out [B, H, N, E] and lse [B, H, N] over each.

        lse_n = ln(e^lse1_n + e^lse2_n),    out_n = e^(lse1_n - lse_n) out1_n + e^(lse2_n - lse_n) out2_n

    A part with lse = -inf has no weight, whatever its out holds. Returns out, lse.
    """
    call = Call("merge_states", out1=out1, lse1=lse1, out2=out2, lse2=lse2)
    shape = call.shape("out1", "B H N E")
    for name in ("lse1", "out2", "lse2"):
        call.shape(name, "B H N" if name[0] == "l" else "B H N E")
    out, lse = call.empty(shape, "out1"), call.empty(shape[:3], "out1", "float32")
    a = call.arrays
    _ext.merge_states(a["out1"], a["lse1"], a["out2"], a["lse2"], out, lse)
    return call.leave(out, lse)


def merge_states_bwd(
    dout: Array, out1: Array, lse1: Array, out2: Array, lse2: Array, *, dlse: Array = None
) -> tuple[Array, Array, Array, Array]:
    """Gradients dout1, dlse1, dout2, dlse2 of merge_states for dout, and optionally dlse.

    With w_i = e^(lse_i - lse): dout_i = w_i dout, dlse_i = w_i (<dout, out_i - out> + dlse).
    """
    call = Call("merge_states_bwd", out1=out1, lse1=lse1, out2=out2, lse2=lse2, dout=dout, dlse=dlse)
    results = []
    for part in "12":
        results.append(call.empty(call.shape(f"out{part}", "B H N E"), f"out{part}"))
        results.append(call.empty(call.shape(f"lse{part}", "B H N"), f"lse{part}"))
    a = call.arrays
    _ext.merge_states_bwd(a["dout"], a["dlse"], a["out1"], a["lse1"], a["out2"], a["lse2"], *results)
    return call.leave(*results)


def sum_arrays(
    terms: Sequence[Array],
    factors: Sequence[float] | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    out: Array = None,
) -> Array:
    """out[b, h, n, :] = sum_i factors[i] * sum over b', h' of terms[i][b', h', n, :], rounded once.

    terms: 1 to 4 arrays [B_i, H_i, N, D] of any of the float dtypes. batch, heads: extents of the result, default those
    of the first term; batch 1 adds up the items, a smaller number of heads adds up consecutive groups of them.
    Returns an array like the first term.
    """
    op = "sum_arrays"
    if not isinstance(terms, (list, tuple)) or not 1 <= len(terms) <= 4:
        raise ValueError(f"[{op}] terms: expected a sequence of 1 to 4 arrays, got {_length_of(terms)}")
    factors = [1.0] * len(terms) if factors is None else factors
    if not isinstance(factors, (list, tuple)) or len(factors) != len(terms):
        raise ValueError(f"[{op}] factors: expected {len(terms)} of them, one per term, got {_length_of(factors)}")
    call = Call(op, terms=terms[0])
    arrays = [call.arrays["terms"], *(call.enter("terms", x) for x in terms[1:])]
    shape = call.shape("terms", "B H N D")
    batch = shape[0] if batch is None else call.extent("batch", batch, 0)
    heads = shape[1] if heads is None else call.extent("heads", heads, 0)
    out = call.out(out, (batch, heads, *shape[2:]), "terms")
    _ext.sum_arrays(arrays, list(factors), out)
    return call.leave(out)


def _length_of(terms: Any) -> str:
    return f"{len(terms)}" if isinstance(terms, (list, tuple)) else type(terms).__name__


def row_dot(x: Array, y: Array, z: Array = None) -> Array:
    """<x, y - z>, row by row: x, y and z (None: 0) are [B, H, N, D]; returns [B, H, N] float32."""
    call = Call("row_dot", x=x, y=y, z=z)
    out = call.empty(call.shape("x", "B H N D")[:3], "x", "float32")
    a = call.arrays
    _ext.row_dot(a["x"], a["y"], a["z"], out)
    return call.leave(out)


def segment_mean(
    x: Array,
    num_segments: int | None = None,
    *,
    segment_size: int | None = None,
    mask: Array = None,
    paired_mask: Array = None,
    return_counts: bool = False,
    out: Array = None,
) -> Array | tuple[Array, Array]:
    """Means of consecutive tokens, over the valid ones only.

    x: [B, H, N, D]. mask: [B, N] bool, True = keep; a masked token may hold NaN.
    num_segments: cut the V valid tokens of an item into S = min(num_segments, V) segments, the first S (V // S + 1) - V
        of V // S tokens, the others of one more; padding changes nothing. paired_mask [B, N'] bounds S by its own
        number of valid tokens, so that two sequences get equally many segments.
    segment_size: or cut by index, segment c being tokens c * segment_size and on.
    return_counts: also return the number of valid tokens per segment, [B, C] int32.
    Returns [B, H, C, D] like x, C = num_segments or ceil(N / segment_size); 0 for a segment without a valid token.
    """
    call = Call("segment_mean", x=x)
    batch, heads, seq, dim = call.shape("x", "B H N D")
    keywords, count = _segments(call, num_segments, segment_size, mask, paired_mask, seq)
    out = call.out(out, (batch, heads, count, dim), "x")
    counts = call.empty((batch, count), "x", "int32") if call.flag("return_counts", return_counts) else None
    _ext.segment_mean(call.arrays["x"], keywords, out, counts)
    return call.leave(out) if counts is None else call.leave(out, counts)


def segment_mean_bwd(
    dout: Array,
    seq: int,
    num_segments: int | None = None,
    *,
    segment_size: int | None = None,
    mask: Array = None,
    paired_mask: Array = None,
    base: Array = None,
) -> Array:
    """Gradient of segment_mean for x [B, H, seq, D]: dout [B, H, C, D] over the count of the segment, 0 for masked
    tokens.

    base [B, H, seq, D] is added before rounding.
    """
    call = Call("segment_mean_bwd", dout=dout, base=base)
    batch, heads, _, dim = call.shape("dout", "B H C D")
    seq = call.extent("seq", seq, 0)
    keywords, _ = _segments(call, num_segments, segment_size, mask, paired_mask, seq)
    dx = call.empty((batch, heads, seq, dim), "dout")
    _ext.segment_mean_bwd(call.arrays["dout"], call.arrays["base"], keywords, dx)
    return call.leave(dx)


def _segments(call: Call, number: Any, size: Any, mask: Array, paired: Array, seq: int) -> tuple[dict[str, Any], int]:
    """The keywords of a segmentation, and how many segments it has."""
    if (number is None) == (size is None):
        got = "neither" if number is None else "both"
        raise ValueError(f"[{call.op}] num_segments: expected num_segments or segment_size, got {got}")
    name, value = ("num_segments", number) if size is None else ("segment_size", size)
    value = call.extent(name, value)
    keywords = {"num_segments": 0, "segment_size": 0, name: value, "mask": mask, "paired_mask": paired}
    return call.keywords(keywords, "mask", "paired_mask"), value if size is None else -(-seq // value)


def softmax_sample(
    q: Array, k: Array, *, num_samples: int = 1, scale: float | None = None, key_mask: Array = None, seed: Any = 0
) -> Array:
    """Keys drawn with the probabilities of softmax attention: [B, H, num_samples, N] int32, -1 for a query without a
    key.

        P(indices[b, h, s, n] = m) = e^(scale <q_n, k_m>) / sum_m' e^(scale <q_n, k_m'>)

    One pass over the keys, no N x M array. The same draws for every item of the batch and any number of threads.
    """
    call = Call("softmax_sample", q=q, k=k)
    batch, heads, seq, _ = call.shape("q", "B H N D")
    call.shape("k", "B Hkv M D")
    num_samples = call.extent("num_samples", num_samples)
    indices = call.empty((batch, heads, num_samples, seq), "q", "int32")
    keywords = {"num_samples": num_samples, "scale": scale, "key_mask": key_mask, "seed": seed}
    _ext.softmax_sample(call.arrays["q"], call.arrays["k"], call.keywords(keywords, "key_mask"), indices)
    return call.leave(indices)
