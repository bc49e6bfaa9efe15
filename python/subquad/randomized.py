"""Randomized attention: RFA, RA, LARA and EVA estimate softmax attention from random features and samples."""

from __future__ import annotations

from typing import Any

from . import _ext
from ._arrays import Array, Call
from .features import state_parts

__all__ = [
    "lara_attention",
    "lara_attention_bwd",
    "randomized_attention",
    "randomized_attention_bwd",
    "rfa_attention",
    "rfa_attention_bwd",
]


def _out_and_lse(call: Call, out: Array, return_lse: bool) -> tuple[Array, Array]:
    """Where the result and, if asked for, its log-sum-exp go."""
    batch, heads, seq, _ = call.shape("q", "B H N D")
    call.shape("k", "B Hkv M D")
    out = call.out(out, (batch, heads, seq, call.shape("v", "B Hkv M E")[3]), "q")
    return out, call.empty((batch, heads, seq), "q", "float32") if call.flag("return_lse", return_lse) else None


def _gradients(call: Call) -> list[Array]:
    call.shape("dout", "B H N E")
    return [call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k", "v")]


def rfa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    features: str = "positive",
    num_features: int = 256,
    projection: Array = None,
    orthogonal: bool = True,
    scale: float | None = None,
    key_mask: Array = None,
    is_causal: bool = False,
    gate: Array = None,
    state: Any = None,
    return_state: bool = False,
    return_lse: bool = False,
    seed: Any = 0,
    out: Array = None,
) -> Any:
    """RFA: attention by random features (Performer; Peng et al., ICLR 2021), in time linear in N.

        out_n = sum_m <phi(q_n), phi(k_m)> v_m / sum_m <phi(q_n), phi(k_m)>

    phi as in feature_map: "positive", "hyperbolic" and "trig" estimate softmax attention, "relu" and "elu" are kernels
    of their own. A ratio of unbiased estimates: bias O(1 / F). The variance of one feature grows as e^|t_q + t_k|^2
    with t = sqrt(scale) x, so rows of large norm need more features than are worth it; `subquad compare` shows the
    error on real data. Positive and hyperbolic features are evaluated with exact stabilisation: no epsilon, finite at
    any norm, and rows stay in the convex hull of the values. The denominator of trig features may come near 0 or below.

    q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E]: float32, float16 or bfloat16, H a multiple of Hkv, D and E in
        1..512; any strides with a contiguous last axis.
    num_features: rows F of the projection. projection: [F, D] or [Hkv, F, D] float32, rows ~ N(0, I), to give it; else
        it is drawn from seed, orthogonal (Haar) or with independent rows, per key head and shared over the batch.
    scale: a number above 0, None is D**-0.5; none with "elu", which takes q and k as they are.
    key_mask [B, M]: bool, True = keep. is_causal: query n sees keys m <= n + (M - N); later tokens do not change a bit.
    gate [B, Hkv, M] in [0, 1], float32 (causal): the sums are S <- g_m S + (1 - g_m) phi(k_m) v_m.
    state, return_state (causal): (S, z, shift or None) as in linear_attention; prefill, then decode with the state and
        the same projection, equals one call.
    return_lse: also the log of the denominator, [B, H, N] float32 (positive or hyperbolic, not causal).
    Returns [B, H, N, E] in the type and dtype of q, then lse, then the state, as asked for.
    """
    keywords = {
        "features": features, "num_features": num_features, "projection": projection, "orthogonal": orthogonal,
        "scale": scale, "key_mask": key_mask, "is_causal": is_causal, "gate": gate, "seed": seed,
    }  # fmt: skip
    call = Call("rfa_attention", q=q, k=k, v=v, projection=projection)
    out, lse = _out_and_lse(call, out, return_lse)
    wanted = call.wants_state(return_state, is_causal)
    given, made = state_parts(call, state), _new_state(call, features, num_features, wanted)
    a = call.arrays
    keywords = call.keywords(keywords, "projection", "key_mask", "gate")
    _ext.rfa_attention(a["q"], a["k"], a["v"], keywords, given, out, lse, made)
    results = [call.leave(x) for x in (out, lse) if x is not None]
    if wanted:
        results.append(tuple(None if part is None else call.leave(part) for part in made))
    return results[0] if len(results) == 1 else tuple(results)


def _new_state(call: Call, features: str, num_features: Any, wanted: bool) -> list[Array]:
    """Arrays for the state S, z, shift that a causal call leaves behind; None for what there is not."""
    if not wanted:
        return [None, None, None]
    projection = call.arrays["projection"]
    if projection is not None and projection.ndim in (2, 3):
        num_features = projection.shape[-2]
    batch, heads_kv, _, dim = call.shape("k", "B Hkv M D")
    width = _ext.feature_dim(call.op, features, call.extent("num_features", num_features), dim)
    shape = (batch, heads_kv, width)
    s = call.empty((*shape, call.shape("v", "B Hkv M E")[3]), "q", "float32")
    shifted = features in ("positive", "hyperbolic", "trig")
    return [s, call.empty(shape, "q", "float32"), call.empty(shape, "q", "float32") if shifted else None]


def rfa_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    features: str = "positive",
    num_features: int = 256,
    projection: Array = None,
    orthogonal: bool = True,
    scale: float | None = None,
    key_mask: Array = None,
    is_causal: bool = False,
    gate: Array = None,
    state: Any = None,
    seed: Any = 0,
    out: Array = None,
    lse: Array = None,
) -> tuple[Array, ...]:
    """Gradients dq, dk, dv of rfa_attention for dout [B, H, N, E], and those of projection and gate where they are
    given.

    Give the keywords of the forward call; the projection is drawn again. The state is a constant. out and lse: what the
    forward pass returned (return_lse=True); with both of them less is formed again.
    """
    keywords = {
        "features": features, "num_features": num_features, "projection": projection, "orthogonal": orthogonal,
        "scale": scale, "key_mask": key_mask, "is_causal": is_causal, "gate": gate, "seed": seed,
    }  # fmt: skip
    call = Call("rfa_attention_bwd", q=q, k=k, v=v, dout=dout, out=out, lse=lse, projection=projection, gate=gate)
    gradients = _gradients(call)
    extra = [
        None if x is None else call.empty(tuple(call.arrays[name].shape), name)
        for name, x in (("projection", projection), ("gate", gate))
    ]
    a = call.arrays
    keywords = call.keywords(keywords, "projection", "key_mask", "gate")
    given = state_parts(call, state)
    _ext.rfa_attention_bwd(a["dout"], a["q"], a["k"], a["v"], keywords, given, a["out"], a["lse"], *gradients, *extra)
    return call.leave(*gradients, *(x for x in extra if x is not None))


def randomized_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_samples: int = 1,
    noise_std: str | float = "exact",
    indices: Array = None,
    noise: Array = None,
    scale: float | None = None,
    key_mask: Array = None,
    grad: str = "pathwise",
    seed: Any = 0,
    out: Array = None,
) -> Array:
    """RA: softmax attention without bias from single samples (Zheng et al., ICML 2022). Quadratic time, linear memory.

        m* ~ softmax_m(scale <q_n, k_m>),    w = q_n + k_m* + noise_std eps,    eps ~ N(0, I)
        out_n = mean over num_samples of sum_m softmax_m(scale <w, k_m> - scale |k_m|^2 / 2) v_m

    E[out] is softmax attention exactly with noise_std="exact" (scale**-0.5). "published" (1), or any other number, is
    biased. The error of one sample is about as large as the output at unit norms and falls as num_samples^-1/2. It is
    the yardstick of its family; for speed take lara_attention, for exactness softmax_attention.

    indices [B, H, S, N] int32, the drawn keys (-1: none), and noise [B, H, S, N, D] float32, standard normal: to give
        them, both or neither; else they are drawn from seed, the same for every item of the batch.
    grad: see randomized_attention_bwd; no part in the forward pass.
    q, k, v, scale, key_mask as in rfa_attention. Returns [B, H, N, E] in the type and dtype of q.
    """
    keywords = {
        "num_samples": num_samples, "noise_std": noise_std, "indices": indices, "noise": noise, "scale": scale,
        "key_mask": key_mask, "grad": grad, "seed": seed,
    }  # fmt: skip
    call = Call("randomized_attention", q=q, k=k, v=v)
    out, _ = _out_and_lse(call, out, False)
    a = call.arrays
    _ext.randomized_attention(a["q"], a["k"], a["v"], call.keywords(keywords, "indices", "noise", "key_mask"), out)
    return call.leave(out)


def randomized_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    num_samples: int = 1,
    noise_std: str | float = "exact",
    indices: Array = None,
    noise: Array = None,
    scale: float | None = None,
    key_mask: Array = None,
    grad: str = "pathwise",
    seed: Any = 0,
) -> tuple[Array, Array, Array]:
    """Gradients dq, dk, dv of randomized_attention for dout [B, H, N, E], for the samples of the forward call.

    grad: "pathwise" differentiates through the samples at fixed keys (as published): exact in mean for v, biased for q
    and k. "unbiased" adds the score-function term of the draw, with exact attention as its baseline: unbiased, two more
    dense passes.
    """
    keywords = {
        "num_samples": num_samples, "noise_std": noise_std, "indices": indices, "noise": noise, "scale": scale,
        "key_mask": key_mask, "grad": grad, "seed": seed,
    }  # fmt: skip
    call = Call("randomized_attention_bwd", q=q, k=k, v=v, dout=dout)
    gradients = _gradients(call)
    a = call.arrays
    keywords = call.keywords(keywords, "indices", "noise", "key_mask")
    _ext.randomized_attention_bwd(a["dout"], a["q"], a["k"], a["v"], keywords, *gradients)
    return call.leave(*gradients)


def _pair(call: Call, name: str, landmarks: Any, parts: tuple[str, str]) -> tuple[Array, Array]:
    """A pair of landmark arrays, or two None."""
    if landmarks is None:
        return None, None
    if not isinstance(landmarks, (tuple, list)) or len(landmarks) != 2:
        got = f"{len(landmarks)} values" if isinstance(landmarks, (tuple, list)) else type(landmarks).__name__
        raise TypeError(f"[{call.op}] {name}: expected None or a pair ({', '.join(parts)}), got {got}")
    for part, x in zip(parts, landmarks, strict=True):
        if x is None:
            raise TypeError(f"[{call.op}] {name} {part}: expected an array, got None")
        call.arrays[part] = call.enter(f"{name} {part}", x)
    return landmarks[0], landmarks[1]


def lara_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_landmarks: int = 49,
    landmarks: tuple[Array, Array] | None = None,
    mis: str = "opt",
    alpha_coeff: float = 1.0,
    t_norm: str = "query",
    samples_per_landmark: int = 1,
    antithetic: bool = False,
    noise: Array = None,
    noise_std: str | float = "exact",
    seed: Any = None,
    scale: float | None = None,
    key_mask: Array = None,
    query_mask: Array = None,
    return_lse: bool = False,
    out: Array = None,
) -> Array | tuple[Array, Array]:
    """LARA: linear randomized attention (Zheng et al., ICML 2022), a few proposals shared by all queries.

        mu_c = q_bar_c + k_bar_c,    w_j = mu_c(j) + noise_std eps_j,    c(j) = j mod C
        h_j = sum_m softmax_m(scale <w_j, k_m> - scale |k_m|^2 / 2) v_m with log-sum-exp L_j
        out_n = sum_j softmax_j(ln alpha_nj + scale <w_j, q_n> + L_j - log_density_j) h_j

    A self-normalised importance sampling estimate of softmax attention: biased at any finite number of samples. With
    noise_std="exact" it converges as samples_per_landmark grows for mis "opt" and "bh", not for "biased", and not with
    "published" noise. Good where landmarks summarise the tokens (images, smooth sequences); on independent tokens it is
    hardly better than the mean of the values. There is no causal form.

    num_landmarks: C = min(num_landmarks, N, M); by default landmarks are means of C segments of the valid tokens.
    landmarks: (q_bar [B, H, C, D], k_bar [B, Hkv, C, D]) to give them, float32 or the dtype of q.
    mis: "opt": weights alpha_nj = max(1e-8, balance_j + alpha_coeff (t_nc - mean_c t_nc)); "bh": the balance heuristic;
        "biased": alpha_nj = e^(scale <mu_c, q_n>).
    t_norm: t is a softmax over the queries ("query", published: rows depend on each other) or over the landmarks
        ("landmark": rows are independent).
    seed None and no noise: evaluation, one noiseless sample per landmark. seed: draws samples_per_landmark per
        landmark, the same for every item of the batch; antithetic: the second half is the first with its noise negated.
    noise [B, H, J, D] float32, standard normal, J a multiple of C: to give it.
    key_mask [B, M], query_mask [B, N]: bool, True = keep; a masked query gives 0 and takes no part in any statistic.
    return_lse: also the log-sum-exp of the last softmax, [B, H, N] float32.
    q, k, v, scale as in rfa_attention. Returns [B, H, N, E] in the type and dtype of q.
    """
    call = Call("lara_attention", q=q, k=k, v=v)
    q_bar, k_bar = _pair(call, "landmarks", landmarks, ("q_bar", "k_bar"))
    keywords = {
        "num_landmarks": num_landmarks, "q_bar": q_bar, "k_bar": k_bar, "mis": mis, "alpha_coeff": alpha_coeff,
        "t_norm": t_norm, "samples_per_landmark": samples_per_landmark, "antithetic": antithetic, "noise": noise,
        "noise_std": noise_std, "seed": seed, "scale": scale, "key_mask": key_mask, "query_mask": query_mask,
    }  # fmt: skip
    out, lse = _out_and_lse(call, out, return_lse)
    a = call.arrays
    _ext.lara_attention(a["q"], a["k"], a["v"], call.keywords(keywords, *_LARA_ARRAYS), out, lse)
    return call.leave(out) if lse is None else call.leave(out, lse)


_LARA_ARRAYS = ("q_bar", "k_bar", "noise", "key_mask", "query_mask")


def lara_attention_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    num_landmarks: int = 49,
    landmarks: tuple[Array, Array] | None = None,
    mis: str = "opt",
    alpha_coeff: float = 1.0,
    t_norm: str = "query",
    samples_per_landmark: int = 1,
    antithetic: bool = False,
    noise: Array = None,
    noise_std: str | float = "exact",
    seed: Any = None,
    scale: float | None = None,
    key_mask: Array = None,
    query_mask: Array = None,
    out: Array = None,
    lse: Array = None,
) -> tuple[Array, ...]:
    """Gradients dq, dk, dv of lara_attention for dout [B, H, N, E], and dq_bar, dk_bar if landmarks are given.

    Through landmarks, samples, weights and densities; noise is a constant and drawn again. out and lse: what the
    forward pass returned (return_lse=True); with both of them less is formed again.
    """
    call = Call("lara_attention_bwd", q=q, k=k, v=v, dout=dout, out=out, lse=lse)
    q_bar, k_bar = _pair(call, "landmarks", landmarks, ("q_bar", "k_bar"))
    keywords = {
        "num_landmarks": num_landmarks, "q_bar": q_bar, "k_bar": k_bar, "mis": mis, "alpha_coeff": alpha_coeff,
        "t_norm": t_norm, "samples_per_landmark": samples_per_landmark, "antithetic": antithetic, "noise": noise,
        "noise_std": noise_std, "seed": seed, "scale": scale, "key_mask": key_mask, "query_mask": query_mask,
    }  # fmt: skip
    gradients, a = _gradients(call), call.arrays
    extra = [None, None] if q_bar is None else [call.empty(tuple(a[x].shape), x) for x in ("q_bar", "k_bar")]
    keywords = call.keywords(keywords, *_LARA_ARRAYS)
    _ext.lara_attention_bwd(a["dout"], a["q"], a["k"], a["v"], keywords, a["out"], a["lse"], *gradients, *extra)
    return call.leave(*gradients, *(x for x in extra if x is not None))
