"""What the distillation of an estimated attention needs of its teacher: in O(N K) memory, without an N x M matrix."""

from __future__ import annotations

from typing import Any

from . import _ext
from ._arrays import Array, Call
from .sparse import visible_of

__all__ = [
    "attention_divergence",
    "attention_divergence_bwd",
    "block_sum",
    "expand_values",
    "teacher_blocks",
]


def expand_values(
    x: Array, num_keys: int, *, key_mask: Array = None, query_mask: Array = None, is_causal: bool = False
) -> Array:
    """Compressed columns x [B, H, N, K] float32 spread over the keys that they stand for: [B, H, N, M = num_keys].

    The key of rank r among the n that a row sees gets the value of column ((2 r + 1) K - 1) // (2 n); keys that a row
    does not see get 0. For inspection and tests: the result is an N x M array. The adjoint of block_sum.
    """
    call = Call("expand_values", x=x)
    shape = call.shape("x", "B H N K")
    num_keys = call.extent("num_keys", num_keys, 0)
    visible, positions = visible_of(call, "x", num_keys, key_mask, query_mask, is_causal)
    y = call.empty((*shape[:3], num_keys), "x")
    _ext.expand_values(call.arrays["x"], visible, positions, y)
    return call.leave(y)


def block_sum(
    y: Array, num_columns: int, *, key_mask: Array = None, query_mask: Array = None, is_causal: bool = False
) -> Array:
    """Sums of y [B, H, N, M] float32 over the keys that each column stands for: [B, H, N, K = num_columns].

    The adjoint of expand_values. What a row does not see may be NaN; a column without a key gives 0.
    """
    call = Call("block_sum", y=y)
    shape = call.shape("y", "B H N M")
    num_columns = call.extent("num_columns", num_columns)
    visible, positions = visible_of(call, "y", shape[3], key_mask, query_mask, is_causal)
    x = call.empty((*shape[:3], num_columns), "y")
    _ext.block_sum(call.arrays["y"], visible, positions, x)
    return call.leave(x)


def teacher_blocks(
    q: Array,
    k: Array,
    num_columns: int,
    *,
    scale: float | None = None,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
) -> tuple[Array, Array, Array]:
    """A teacher's attention as far as the losses of an estimate with K = num_columns columns need it.

        P = softmax over the keys that row n sees of scale <q_n, k_m>
        masses_c = sum of P over the keys of column c,    sum_squares = sum P^2,    sum_plogp = sum P ln P

    With log-weights s_c per column, w_c keys in column c and L = ln sum_c w_c e^s_c, the divergence of the expanded
    estimate is sum_plogp - sum_c masses_c s_c + L, exactly.

    q [B, H, N, D], k [B, Hkv, M, D]: float32, float16 or bfloat16. scale: None is D**-0.5. Masks: bool, True = keep.
    Returns masses [B, H, N, K], sum_squares and sum_plogp [B, H, N] float32; 0 for a row that sees no key. The teacher
    is a constant: no gradient. Time as exact attention, memory O(N K).
    """
    call = Call("teacher_blocks", q=q, k=k)
    batch, heads, seq, _ = call.shape("q", "B H N D")
    num_keys = call.shape("k", "B Hkv M D")[2]
    num_columns = call.extent("num_columns", num_columns)
    visible, positions = visible_of(call, "q", num_keys, key_mask, query_mask, is_causal)
    masses = call.empty((batch, heads, seq, num_columns), "q", "float32")
    squares, plogp = (call.empty((batch, heads, seq), "q", "float32") for _ in range(2))
    keywords = {"scale": scale, "visible": visible, "positions": positions}
    _ext.teacher_blocks(call.arrays["q"], call.arrays["k"], keywords, masses, squares, plogp)
    return call.leave(masses, squares, plogp)


def attention_divergence(
    q: Array,
    k: Array,
    q_teacher: Array,
    k_teacher: Array,
    *,
    scale: float | None = None,
    scale_teacher: float | None = None,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
) -> tuple[Array, Array]:
    """How far a student's attention is from its teacher's, row by row.

        S = softmax(scale <q_n, k_m>),    T = softmax(scale_teacher <qt_n, kt_m>)    over the keys that row n sees
        kl_n = sum_m T_nm ln(T_nm / S_nm),    sse_n = sum_m (S_nm - T_nm)^2

    q [B, H, N, D], k [B, Hkv, M, D], q_teacher [B, H, N, Dt], k_teacher [B, Ht, M, Dt]: float32, float16 or bfloat16.
    scale, scale_teacher: None is D**-0.5 and Dt**-0.5. Masks: bool, True = keep.
    Returns kl, sse [B, H, N] float32; 0 for a row that sees no key. Time as exact attention, memory O(N + M).
    """
    call = Call("attention_divergence", q=q, k=k, q_teacher=q_teacher, k_teacher=k_teacher)
    keywords = _divergence(call, scale, scale_teacher, key_mask, query_mask, is_causal)
    kl, sse = (call.empty(call.shape("q", "B H N D")[:3], "q", "float32") for _ in range(2))
    a = call.arrays
    _ext.attention_divergence(a["q"], a["k"], a["q_teacher"], a["k_teacher"], keywords, kl, sse)
    return call.leave(kl, sse)


def attention_divergence_bwd(
    dkl: Array,
    dsse: Array,
    q: Array,
    k: Array,
    q_teacher: Array,
    k_teacher: Array,
    *,
    scale: float | None = None,
    scale_teacher: float | None = None,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
) -> tuple[Array, Array]:
    """Gradients dq, dk of attention_divergence for dkl, dsse [B, H, N] float32 (None: 0); the teacher is constant."""
    call = Call("attention_divergence_bwd", q=q, k=k, q_teacher=q_teacher, k_teacher=k_teacher, dkl=dkl, dsse=dsse)
    keywords = _divergence(call, scale, scale_teacher, key_mask, query_mask, is_causal)
    dq, dk = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k"))
    a = call.arrays
    _ext.attention_divergence_bwd(a["dkl"], a["dsse"], a["q"], a["k"], a["q_teacher"], a["k_teacher"], keywords, dq, dk)
    return call.leave(dq, dk)


def _divergence(
    call: Call, scale: Any, scale_teacher: Any, key_mask: Array, query_mask: Array, is_causal: bool
) -> dict[str, Any]:
    call.shape("q", "B H N D")
    num_keys = call.shape("k", "B Hkv M D")[2]
    visible, positions = visible_of(call, "q", num_keys, key_mask, query_mask, is_causal)
    return {"scale": scale, "scale_teacher": scale_teacher, "visible": visible, "positions": positions}
