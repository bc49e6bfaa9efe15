"""EVA: exact attention inside blocks, control variates outside, with a state for decoding."""

from __future__ import annotations

from typing import Any

from . import _ext
from ._arrays import Array, Call
from .randomized import _gradients, _out_and_lse, _pair

__all__ = ["eva_attention", "eva_attention_bwd"]

_EVA_ARRAYS = ("k_bar", "mu", "noise", "key_mask")
_STATE = ("k_tail", "v_tail", "mask_tail", "k_bar", "beta", "log_mass")


def eva_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int = 64,
    chunk_size: int = 64,
    landmarks: tuple[Array, Array] | None = None,
    noise: Array = None,
    partition: bool = True,
    chunk_mass: bool = True,
    state: Any = None,
    return_state: bool = False,
    scale: float | None = None,
    key_mask: Array = None,
    is_causal: bool = False,
    return_lse: bool = False,
    seed: Any = None,
    out: Array = None,
) -> Any:
    """EVA: randomized attention with control variates (Zheng et al., ICLR 2023); N (window + N / chunk_size).

        beta_c = sum over chunk c of softmax_m(scale <w_c, k_m> - scale |k_m|^2 / 2) v_m
        out_n = softmax over [scale <q_n, k_m>, m in block of n; scale <q_n, k_bar_c> + ln |chunk c|] of [v_m; beta_c]

    Exact where a block holds all keys, or every chunk one key; biased otherwise, for a chunk counts as its mean key.
    Good where neighbouring keys are alike; on independent keys no better than the mean of the values.

    window: block of query n + (M - N) is its number // window. partition: chunks that overlap the block are left out
        (chunk_size divides window or the reverse); False as published: they count twice. chunk_mass: the term ln
        |chunk| over valid keys; False as published. A chunk without a valid key is dropped.
    landmarks: (k_bar, mu), each [B, Hkv, C, D] with C = ceil(M / chunk_size), float32 or the dtype of q; default: both
        the mean of the chunk's valid keys. w_c = mu_c, plus scale^-1/2 noise_c with noise [B, Hkv, C, D] float32 given
        or drawn from a seed (the same for every item of the batch).
    is_causal: a query sees the tokens of its block up to itself and chunks that end before the block begins (partition
        False: before its own chunk begins). Tokens between (chunk_size above window) are not seen.
    state, return_state (causal): (k_tail, v_tail, mask_tail or None, k_bar, beta, log_mass); prefill, then decode with
        the state, equals one call. With a state, landmarks and noise are those of the tail's and the new chunks.
    return_lse: also the log-sum-exp, [B, H, N] float32.
    q, k, v, scale, key_mask as in rfa_attention. Returns [B, H, N, E] in the type and dtype of q, then lse and state.
    """
    call = Call("eva_attention", q=q, k=k, v=v)
    past = _go_on(call, state, key_mask)
    k_bar, mu = _pair(call, "landmarks", landmarks, ("k_bar", "mu"))
    keywords = {
        "window": window, "chunk_size": chunk_size, "k_bar": k_bar, "mu": mu, "noise": noise, "seed": seed,
        "partition": partition, "chunk_mass": chunk_mass, "scale": scale, "key_mask": None, "is_causal": is_causal,
    }  # fmt: skip
    keywords = call.keywords(keywords, *_EVA_ARRAYS)
    keywords["key_mask"] = call.arrays["key_mask"]
    out, lse = _out_and_lse(call, out, return_lse)
    wanted = call.wants_state(return_state, is_causal)
    made = _chunks(call, chunk_size) if wanted else [None, None, None]
    a = call.arrays
    _ext.eva_attention(a["q"], a["k"], a["v"], keywords, past, out, lse, made)
    results = [call.leave(x) for x in (out, lse) if x is not None]
    if wanted:
        results.append(_leave_state(call, max(window, chunk_size), chunk_size, past, made))
    return results[0] if len(results) == 1 else tuple(results)


def eva_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int = 64,
    chunk_size: int = 64,
    landmarks: tuple[Array, Array] | None = None,
    noise: Array = None,
    partition: bool = True,
    chunk_mass: bool = True,
    state: Any = None,
    scale: float | None = None,
    key_mask: Array = None,
    is_causal: bool = False,
    seed: Any = None,
    out: Array = None,
    lse: Array = None,
) -> tuple[Array, ...]:
    """Gradients dq, dk, dv of eva_attention for dout [B, H, N, E], and dk_bar, dmu if landmarks are given.

    Through landmarks and beta; noise and the state are constants. out and lse: what the forward pass returned
    (return_lse=True); with both of them less is formed again.
    """
    call = Call("eva_attention_bwd", q=q, k=k, v=v, dout=dout, out=out, lse=lse)
    own = call.shape("k", "B Hkv M D")[2]
    past = _go_on(call, state, key_mask)
    k_bar, mu = _pair(call, "landmarks", landmarks, ("k_bar", "mu"))
    keywords = {
        "window": window, "chunk_size": chunk_size, "k_bar": k_bar, "mu": mu, "noise": noise, "seed": seed,
        "partition": partition, "chunk_mass": chunk_mass, "scale": scale, "key_mask": None, "is_causal": is_causal,
    }  # fmt: skip
    keywords = call.keywords(keywords, *_EVA_ARRAYS)
    keywords["key_mask"] = call.arrays["key_mask"]
    gradients, a = _gradients(call), call.arrays
    extra = [None, None] if k_bar is None else [call.empty(tuple(a[x].shape), x) for x in ("k_bar", "mu")]
    _ext.eva_attention_bwd(a["dout"], a["q"], a["k"], a["v"], keywords, past, a["out"], a["lse"], *gradients, *extra)
    tail = a["k"].shape[2] - own
    if tail:
        gradients[1:3] = (call.framework.concatenate([g[:, :, tail:]]) for g in gradients[1:3])
    return call.leave(*gradients, *(x for x in extra if x is not None))


def _go_on(call: Call, state: Any, key_mask: Array) -> list[Array]:
    """Puts the tail of a state in front of k, v and the mask, and returns its chunks."""
    key_mask = call.enter("key_mask", key_mask)
    call.arrays["key_mask"] = key_mask
    if state is None:
        return [None, None, None]
    k_tail, v_tail, mask_tail, *past = (call.enter("state", part) for part in call.state(state, _STATE))
    for name, tail in (("k", k_tail), ("v", v_tail)):
        shape = call.shape(name, "B Hkv M D")
        expected = (*shape[:2], None if tail is None or tail.ndim != 4 else tail.shape[2], shape[3])
        if tail is None or tuple(tail.shape) != expected or tail.dtype != call.arrays[name].dtype:
            got = "None" if tail is None else f"{list(tail.shape)} of {tail.dtype}"
            wanted = f"[{shape[0]}, {shape[1]}, T, {shape[3]}] of {call.arrays[name].dtype}"
            raise ValueError(f"[{call.op}] state {name}_tail: expected {wanted}, got {got}")
    for name, part in zip(("k_bar", "beta", "log_mass"), past, strict=True):
        if part is None:
            raise TypeError(f"[{call.op}] state {name}: expected an array, got None")
    batch, _, seq, _ = call.shape("k", "B Hkv M D")
    length = k_tail.shape[2]
    if v_tail.shape[2] != length or (mask_tail is not None and tuple(mask_tail.shape) != (batch, length)):
        raise ValueError(f"[{call.op}] state: expected a v_tail and mask_tail of {length} tokens as k_tail, got others")
    if length:
        join = call.framework.concatenate
        if key_mask is not None or mask_tail is not None:
            ones = [call.framework.ones((batch, n), call.arrays["k"]) for n in (length, seq)]
            parts = [x if x is not None else one for x, one in zip((mask_tail, key_mask), ones, strict=True)]
            call.arrays["key_mask"] = join(parts, 1)
        for name, tail in (("k", k_tail), ("v", v_tail)):
            call.arrays[name] = join([tail, call.arrays[name]])
    return list(past)


def _chunks(call: Call, chunk_size: Any) -> list[Array]:
    """Arrays for the chunks of k."""
    chunk_size = call.extent("chunk_size", chunk_size)
    batch, heads_kv, seq, dim = call.shape("k", "B Hkv M D")
    count, dim_v = -(-seq // chunk_size), call.shape("v", "B Hkv M E")[3]
    shapes = ((batch, heads_kv, count, dim), (batch, heads_kv, count, dim_v), (batch, count))
    return [call.empty(shape, "k", "float32") for shape in shapes]


def _leave_state(call: Call, period: int, chunk_size: int, past: list[Array], made: list[Array]) -> tuple[Array, ...]:
    """The state behind the last token: the tail since the last multiple of `period`, and the chunks before it."""
    a, join = call.arrays, call.framework.concatenate
    seq = a["k"].shape[2]
    done = seq - seq % period
    tails = [join([a[name][:, :, done:]]) for name in ("k", "v")]
    mask = None if a["key_mask"] is None else join([a["key_mask"][:, done:]], 1)
    complete = done // chunk_size
    chunks = []
    for axis, old, new in zip((2, 2, 1), past, made, strict=True):
        new = new[:, :, :complete] if axis == 2 else new[:, :complete]
        chunks.append(join([new] if old is None else [old, new], axis))
    return tuple(None if x is None else call.leave(x) for x in (*tails, mask, *chunks))
