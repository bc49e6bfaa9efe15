"""Locality-sensitive hashing and the attention operators built on bucket collisions."""

from __future__ import annotations

from typing import Any

from . import _ext
from ._arrays import Array, Call

__all__ = [
    "bucket_attention",
    "bucket_attention_bwd",
    "bucket_gradient",
    "bucket_sort",
    "collision_attention",
    "collision_attention_bwd",
    "l2_normalize",
    "l2_normalize_bwd",
    "lsh_hash",
]


def lsh_hash(
    x: Array,
    planes: Array = None,
    *,
    signs: Array = None,
    num_hashes: int | None = None,
    hash_bits: int | None = None,
    carving: str = "strided",
    out: Array = None,
) -> Array:
    """SimHash bucket codes: bit j of hash r is set where projection (r, j) of a token is positive; bit 0 is the lowest.

    x: [B, H, N, D] float32, float16 or bfloat16, D in 1..512 (256 on CUDA).
    planes: [R, J, D] or [Hp, R, J, D] float32, H a multiple of Hp: explicit hyperplanes, codes = signs of planes . x.
    signs: [3, P, D2] or [Hp, 3, P, D2] float32 of +-1 instead of planes: three rounds of sign flips and Walsh-Hadamard
        transforms, needs num_hashes and hash_bits; D2 is the power of two >= max(D, 64) and P the number of transforms.
    carving: "strided" spreads the bits of a code over the transforms (nearly the hyperplane law), "published" takes
        them from one transform as the published code does, which makes collisions of far vectors up to 60 % too rare.
    Returns codes [B, H, R, N], uint16 up to 16 bits, else int32.

    Hadamard codes are bit-equal on every backend; Gaussian ones outside |projection| <= D * 2^-23 * |x| * |plane|,
    and between CPU and CUDA outside (D + 8) * 2^-22 * |x| * |plane|.
    Zero vectors and NaN give code 0.
    """
    call = Call("lsh_hash", x=x)
    batch, heads, seq, dim = call.shape("x", "B H N D")
    if (planes is None) == (signs is None):
        raise ValueError(f"[lsh_hash] planes: expected planes or signs, got {'neither' if planes is None else 'both'}")
    if planes is not None:
        planes = _with_heads(call.enter("planes", planes), 4)
        if planes.ndim != 4:
            raise ValueError(f"[lsh_hash] planes: expected shape [Hp, R, J, D], got {list(planes.shape)}")
        for name, given, found in (
            ("num_hashes", num_hashes, planes.shape[1]),
            ("hash_bits", hash_bits, planes.shape[2]),
        ):
            if given is not None and given != found:
                raise ValueError(f"[lsh_hash] {name}: expected {found} as in planes, got {given}")
        if carving != "strided":
            raise ValueError(
                f'[lsh_hash] carving: expected "strided" with planes, which are not carved, got "{carving}"'
            )
        num_hashes, hash_bits = int(planes.shape[1]), int(planes.shape[2])
    elif num_hashes is None or hash_bits is None:
        raise ValueError("[lsh_hash] signs: expected num_hashes and hash_bits with them, got None")
    if isinstance(num_hashes, bool) or not isinstance(num_hashes, int):
        raise TypeError(f"[lsh_hash] num_hashes: expected an integer, got {type(num_hashes).__name__}")
    if num_hashes < 1:
        raise ValueError(f"[lsh_hash] num_hashes: expected a value of at least 1, got {num_hashes}")
    wide = isinstance(hash_bits, int) and hash_bits > 16
    codes = call.out(out, (batch, heads, num_hashes, seq), "x", "int32" if wide else "uint16")
    if planes is not None:
        _ext.lsh_hash(call.arrays["x"], planes, codes)
    else:
        signs = _with_heads(call.enter("signs", signs), 4)
        _ext.lsh_hash_hadamard(call.arrays["x"], signs, hash_bits, carving, codes)
    return call.leave(codes)


def _with_heads(array: Array, rank: int) -> Array:
    """The array with a leading axis of one head where that axis was left out."""
    return array[None] if array.ndim == rank - 1 else array


def bucket_sort(codes: Array, num_buckets: int, *, mask: Array = None) -> tuple[Array, Array]:
    """Group tokens by bucket: a stable sort of codes in linear time.

    codes: [B, H, R, N] uint16 or int32 with values in [0, num_buckets); mask: [B, N] bool, True = keep.
    Returns order [B, H, R, N] int32 (tokens by ascending code, equal codes in token order, masked tokens last) and
    offsets [B, H, R, num_buckets + 1] int32: bucket c is order[..., offsets[..., c] : offsets[..., c + 1]].
    """
    call = Call("bucket_sort", codes=codes, mask=mask)
    batch, heads, hashes, seq = call.shape("codes", "B H R N")
    if isinstance(num_buckets, int) and not 1 <= num_buckets <= 1 << 24:
        raise ValueError(f"[bucket_sort] num_buckets: expected a value in [1, 16777216], got {num_buckets}")
    order = call.empty((batch, heads, hashes, seq), "codes", "int32")
    size = num_buckets + 1 if isinstance(num_buckets, int) else 0
    offsets = call.empty((batch, heads, hashes, size), "codes", "int32")
    _ext.bucket_sort(call.arrays["codes"], num_buckets, call.arrays["mask"], order, offsets)
    return call.leave(order, offsets)


def bucket_attention(
    codes_q: Array,
    codes_k: Array,
    v: Array,
    num_buckets: int,
    *,
    scale: float = 1.0,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    out: Array = None,
) -> Array:
    """out[b,h,n] = scale * sum over hashes r and keys m with codes_q[b,h,r,n] == codes_k[b,g,r,m] of v[b,g,m].

    codes_q: [B, H, R, N], codes_k: [B, Hkv, R, M], one dtype (uint16 or int32), values in [0, num_buckets);
    v: [B, Hkv, M, E]. key_mask [B, M], query_mask [B, N]: bool, True = keep. is_causal: query n sees keys
    m <= n + (M - N).
    Returns [B, H, N, E] like v. Linear in N + M for any codes, memory bounded for any num_buckets up to 2^24.
    """
    call = Call("bucket_attention", v=v, codes_q=codes_q, codes_k=codes_k, key_mask=key_mask, query_mask=query_mask)
    batch, heads, _, seq = call.shape("codes_q", "B H R N")
    out = call.out(out, (batch, heads, seq, call.shape("v", "B Hkv M E")[3]), "v")
    a = call.arrays
    _ext.bucket_attention(
        a["codes_q"], a["codes_k"], a["v"], num_buckets, scale, a["key_mask"], a["query_mask"], is_causal, out
    )
    return call.leave(out)


def bucket_attention_bwd(
    dout: Array,
    codes_q: Array,
    codes_k: Array,
    num_buckets: int,
    *,
    scale: float = 1.0,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
) -> Array:
    """The exact gradient of bucket_attention for v: the transposed sum, [B, Hkv, M, E] like dout [B, H, N, E]."""
    call = Call(
        "bucket_attention_bwd", dout=dout, codes_q=codes_q, codes_k=codes_k, key_mask=key_mask, query_mask=query_mask
    )
    batch, heads, _, seq = call.shape("codes_k", "B Hkv R M")
    dv = call.empty((batch, heads, seq, call.shape("dout", "B H N E")[3]), "dout")
    a = call.arrays
    _ext.bucket_attention_bwd(
        a["dout"], a["codes_q"], a["codes_k"], num_buckets, scale, a["key_mask"], a["query_mask"], is_causal, dv
    )
    return call.leave(dv)


def bucket_gradient(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    codes_q: Array,
    codes_k: Array,
    hash_bits: int,
    *,
    grad: str = "lower_bound",
    num_samples: int = 4,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    seed: Any = 0,
) -> tuple[Array, Array]:
    """Unbiased estimates of collision attention's gradients for q and k from colliding pairs, at linear cost.

    dout: [B, H, N, E]; q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E] of one dtype; codes as lsh_hash gave them.
    grad: "lower_bound" estimates the published surrogate (tau / 2) u^tau, "exact" the true derivative, from pairs whose
    codes are equal or differ in one bit. At most num_samples pairs per (row, hash) are evaluated (with "exact" as many
    again), drawn evenly from the bucket and weighted up, so the cost does not depend on the bucket loads.
    Returns dq, dk.
    """
    call = Call(
        "bucket_gradient",
        q=q,
        k=k,
        v=v,
        dout=dout,
        codes_q=codes_q,
        codes_k=codes_k,
        key_mask=key_mask,
        query_mask=query_mask,
    )
    dq, dk = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k"))
    a = call.arrays
    _ext.bucket_gradient(
        a["dout"], a["q"], a["k"], a["v"], a["codes_q"], a["codes_k"], hash_bits, num_samples, grad, seed,
        a["key_mask"], a["query_mask"], is_causal, dq, dk,
    )  # fmt: skip
    return call.leave(dq, dk)


def collision_attention(
    q: Array,
    k: Array,
    v: Array,
    hash_bits: int,
    *,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    out: Array = None,
) -> Array:
    """out[b,h,n] = sum over keys m of (1 - acos(x_nm) / pi)^hash_bits v[b,g,m], x the cosine of q_n and k_m.

    The weight is the probability that two codes of hash_bits random hyperplanes agree (YOSO in expectation).
    q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E] of one dtype; masks and is_causal as in bucket_attention.
    Returns [B, H, N, E]. O(N M) time, O(N + M) memory.
    """
    call = Call("collision_attention", q=q, k=k, v=v, key_mask=key_mask, query_mask=query_mask)
    out = call.out(out, (*call.shape("q", "B H N D")[:3], call.shape("v", "B Hkv M E")[3]), "q")
    a = call.arrays
    _ext.collision_attention(a["q"], a["k"], a["v"], hash_bits, a["key_mask"], a["query_mask"], is_causal, out)
    return call.leave(out)


def collision_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    hash_bits: int,
    *,
    grad: str = "exact",
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients dq, dk, dv of collision_attention; grad: "exact", or "lower_bound" for the published surrogate.

    Finite for parallel, opposite and zero rows; O(N M) time, O(N + M) memory.
    """
    call = Call("collision_attention_bwd", q=q, k=k, v=v, dout=dout, key_mask=key_mask, query_mask=query_mask)
    dq, dk, dv = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k", "v"))
    a = call.arrays
    _ext.collision_attention_bwd(
        a["dout"], a["q"], a["k"], a["v"], hash_bits, grad, a["key_mask"], a["query_mask"], is_causal, dq, dk, dv
    )
    return call.leave(dq, dk, dv)


def l2_normalize(x: Array, *, return_lse: bool = False, out: Array = None) -> Array | tuple[Array, Array]:
    """Rows of x [B, H, N, D] over their l2 norm; a zero row stays zero. return_lse adds ln |x| [B, H, N] float32."""
    call = Call("l2_normalize", x=x)
    shape = call.shape("x", "B H N D")
    out = call.out(out, shape, "x")
    lse = call.empty(shape[:3], "x", "float32") if call.flag("return_lse", return_lse) else None
    _ext.l2_normalize(call.arrays["x"], out, lse)
    return call.leave(out) if lse is None else call.leave(out, lse)


def l2_normalize_bwd(dy: Array, y: Array, lse: Array) -> Array:
    """Gradient of l2_normalize for x: (dy - y <y, dy>) exp(-lse), and 0 for zero rows; y, lse as l2_normalize gave."""
    call = Call("l2_normalize_bwd", dy=dy, y=y, lse=lse)
    dx = call.empty(call.shape("dy", "B H N D"), "dy")
    _ext.l2_normalize_bwd(call.arrays["dy"], call.arrays["y"], call.arrays["lse"], dx)
    return call.leave(dx)
