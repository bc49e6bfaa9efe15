"""The methods of the literature: short compositions of the operators."""

from __future__ import annotations

from typing import Any

from . import _ext
from ._arrays import Array, Call

__all__ = ["yoso_attention", "yoso_attention_bwd"]

_YOSO_ARRAYS = ("planes", "signs", "key_mask", "query_mask")


def yoso_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_hashes: int = 32,
    hash_bits: int = 8,
    hashing: str = "hadamard",
    carving: str = "strided",
    planes: Array = None,
    signs: Array = None,
    expectation: bool = False,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    normalize: bool = True,
    seed: Any = 0,
    grad: str | None = None,
    return_lse: bool = False,
    out: Array = None,
) -> Array | tuple[Array, Array]:
    """YOSO: Bernoulli sampling attention by locality-sensitive hashing (Zeng et al., ICML 2021).

        X_n = (1 / num_hashes) sum_r sum_m [code_r(q_n) == code_r(k_m)] v_m,        out_n = X_n / |X_n|

    in time linear in N. E[X_n] = sum_m (1 - angle(q_n, k_m) / pi)^hash_bits v_m, which expectation=True computes
    densely (YOSO-E). This is an attention of its own, not an approximation of softmax attention: it has no temperature,
    and a model has to be trained, or at least tuned, with it. The standard deviation of X falls as num_hashes^-1/2.

    q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E]: float32, float16 or bfloat16, H a multiple of Hkv, D and E in
        1..512 (256 on CUDA); any strides with a contiguous last axis.
    num_hashes, hash_bits: the number of codes (samples) and bits per code, 1..24; hash_bits of about log2(M) is usual.
    hashing: "hadamard" (fast, nearly unbiased) or "gaussian" (exactly unbiased, slower); carving: see lsh_hash.
    planes [num_hashes, hash_bits, D] or signs [3, P, D2], each optionally with a leading Hkv axis: explicit randomness.
    key_mask [B, M], query_mask [B, N]: bool, True = keep. A masked key may hold NaN; a masked query gives 0.
    is_causal: query n sees keys m <= n + (M - N).
    normalize: divide each output row by its l2 norm (a row without collisions stays 0).
    seed: an int, or a 0-d int64 array; planes are drawn per key head and shared over the batch.
    grad: how gradients for q and k are formed, see yoso_attention_bwd; no part in the forward pass.
    return_lse: also return ln |X| [B, H, N] float32 (-inf for a row without collisions); needs normalize.
    Returns [B, H, N, E] in the type and dtype of q.
    """
    keywords = {
        "num_hashes": num_hashes, "hash_bits": hash_bits, "hashing": hashing, "carving": carving, "planes": planes,
        "signs": signs, "expectation": expectation, "key_mask": key_mask, "query_mask": query_mask,
        "is_causal": is_causal, "normalize": normalize, "seed": seed, "grad": grad,
    }  # fmt: skip
    call = Call("yoso_attention", q=q, k=k, v=v)
    batch, heads, seq, _ = call.shape("q", "B H N D")
    call.shape("k", "B Hkv M D")
    out = call.out(out, (batch, heads, seq, call.shape("v", "B Hkv M E")[3]), "q")
    lse = call.empty((batch, heads, seq), "q", "float32") if return_lse else None
    a = call.arrays
    _ext.yoso_attention(a["q"], a["k"], a["v"], call.keywords(keywords, *_YOSO_ARRAYS), out, lse)
    return call.leave(out) if lse is None else call.leave(out, lse)


def yoso_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    num_hashes: int = 32,
    hash_bits: int = 8,
    hashing: str = "hadamard",
    carving: str = "strided",
    planes: Array = None,
    signs: Array = None,
    expectation: bool = False,
    key_mask: Array = None,
    query_mask: Array = None,
    is_causal: bool = False,
    normalize: bool = True,
    seed: Any = 0,
    grad: str | None = None,
    out: Array = None,
    lse: Array = None,
) -> tuple[Array, Array, Array]:
    """Gradients dq, dk, dv of yoso_attention for the gradient dout [B, H, N, E] of its result.

    Give the keywords of the forward call; codes are hashed again from the seed or the explicit arrays. out and lse:
    what the forward pass returned (return_lse=True); with both of them the sum X is not formed again.

    dv is exact for the sum that the forward pass formed. dq and dk, with tau = hash_bits, are by `grad`
    "sampled": linear cost, unbiased over the draw for "lower_bound" (default when sampling);
    "sampled_exact": linear cost, unbiased for "exact";
    "lower_bound": the published surrogate dp/dx = (tau / 2) p of p = u^tau, dense, O(N M) time;
    "exact": the true derivative, dense, O(N M) time (default with expectation=True, where only the dense two exist).
    With normalize a row without collisions passes no gradient.
    """
    keywords = {
        "num_hashes": num_hashes, "hash_bits": hash_bits, "hashing": hashing, "carving": carving, "planes": planes,
        "signs": signs, "expectation": expectation, "key_mask": key_mask, "query_mask": query_mask,
        "is_causal": is_causal, "normalize": normalize, "seed": seed, "grad": grad,
    }  # fmt: skip
    call = Call("yoso_attention_bwd", q=q, k=k, v=v, dout=dout, out=out, lse=lse)
    dq, dk, dv = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k", "v"))
    a = call.arrays
    _ext.yoso_attention_bwd(
        a["dout"], a["q"], a["k"], a["v"], call.keywords(keywords, *_YOSO_ARRAYS), a["out"], a["lse"], dq, dk, dv
    )
    return call.leave(dq, dk, dv)
