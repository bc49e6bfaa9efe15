"""Random features, projections, and the attention of kernels that factor."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _ext
from ._arrays import Array, Call, Jax, extent, framework_of

__all__ = [
    "feature_map",
    "feature_map_bwd",
    "linear_attention",
    "linear_attention_bwd",
    "mixture_proposals",
    "mixture_proposals_bwd",
    "mixture_weights",
    "mixture_weights_bwd",
    "orthogonal_projection",
    "sampled_proposals",
    "sampled_proposals_bwd",
]


def feature_map(
    x: Array,
    projection: Array = None,
    features: str = "positive",
    *,
    scale: float | None = None,
    log: bool = False,
    mask: Array = None,
    return_log_factor: bool = False,
    out: Array = None,
) -> Array | tuple[Array, Array]:
    """Features whose inner products estimate, or stand in for, the softmax kernel e^(scale <x, y>).

    With w_i the F rows of projection and t = sqrt(scale) x:
    "positive"    e^(<w_i, t> - |t|^2 / 2) / sqrt(F), unbiased, variance SM^2 (e^|t_x + t_y|^2 - 1) / F;
    "hyperbolic"  the same for w_i and -w_i, 2F features, half of SM^2 (e^z - 1)(1 - e^-z) / F with z = |t_x + t_y|^2;
    "trig"        [sin <w_i, t>, cos <w_i, t>] / sqrt(F), 2F features, e^(|t|^2 / 2) apart (return_log_factor);
    "relu"        max(0, <w_i, t>) + 1e-3 / sqrt(F), a kernel of its own;
    "elu"         x + 1 where x > 0, else e^x: no projection, no scale, a kernel of its own.

    x [B, H, N, D]; projection [F, D] or [Hp, F, D] float32, Hp dividing H, rows ~ N(0, I). scale: None is D**-0.5.
    log: the logarithms of positive or hyperbolic features without their constant -ln(F') / 2; they do not underflow.
    mask [B, N] bool, True = keep: a masked token gives 0 (logarithms: -inf), even if it holds NaN.
    Returns [B, H, N, F'] like x (float32 if log), and with return_log_factor |t|^2 / 2 [B, H, N] float32.
    """
    call = Call("feature_map", x=x, projection=projection)
    batch, heads, seq, dim = call.shape("x", "B H N D")
    projection, width = _projection(call, features, dim)
    out = call.out(out, (batch, heads, seq, width), "x", "float32" if log is True else None)
    wanted = call.flag("return_log_factor", return_log_factor)
    factor = call.empty((batch, heads, seq), "x", "float32") if wanted else None
    keywords = call.keywords({"features": features, "scale": scale, "log": log, "mask": mask}, "mask")
    _ext.feature_map(call.arrays["x"], projection, keywords, out, factor)
    return call.leave(out) if factor is None else call.leave(out, factor)


def feature_map_bwd(
    dout: Array,
    x: Array,
    projection: Array = None,
    features: str = "positive",
    *,
    scale: float | None = None,
    log: bool = False,
    mask: Array = None,
    dlog_factor: Array = None,
) -> tuple[Array, ...] | Array:
    """Gradients dx, and dprojection if a projection is given, of feature_map for dout [B, H, N, F']."""
    call = Call("feature_map_bwd", x=x, projection=projection, dout=dout, dlog_factor=dlog_factor)
    call.shape("dout", "B H N F'")
    dim = call.shape("x", "B H N D")[3]
    given, (projection, _) = call.arrays["projection"], _projection(call, features, dim)
    dx = call.empty(call.shape("x", "B H N D"), "x")
    keywords = call.keywords({"features": features, "scale": scale, "log": log, "mask": mask}, "mask")
    if projection is None:
        _ext.feature_map_bwd(
            call.arrays["dout"], call.arrays["dlog_factor"], call.arrays["x"], None, keywords, dx, None
        )
        return call.leave(dx)
    gradient = call.empty(tuple(given.shape), "projection")
    wide = gradient if gradient.ndim == 3 else gradient[None]
    a = call.arrays
    _ext.feature_map_bwd(a["dout"], a["dlog_factor"], a["x"], projection, keywords, dx, wide)
    return call.leave(dx, gradient)


def _projection(call: Call, features: str, dim: int) -> tuple[Array, int]:
    """The projection [Hp, F, D] (None stays None) and the number of features it gives."""
    projection = call.arrays["projection"]
    if projection is None:
        return None, _ext.feature_dim(call.op, features, 0, dim)
    if projection.ndim not in (2, 3):
        got = list(projection.shape)
        raise ValueError(f"[{call.op}] projection: expected shape [F, D] or [Hp, F, D], got {got}")
    wide = projection if projection.ndim == 3 else projection[None]
    return wide, _ext.feature_dim(call.op, features, int(wide.shape[1]), dim)


def orthogonal_projection(
    num_features: int, dim: int, *, seed: Any, heads: int | None = None, kind: str = "haar", out: Array = None
) -> Array:
    """Random rows for feature maps: [num_features, dim] float32, or [heads, num_features, dim].

    kind: "haar": every dim rows are those of a Haar orthogonal matrix with the lengths of normal vectors, so that each
        row is N(0, I) exactly and feature maps stay unbiased with less variance than independent rows;
    "hadamard": rows of H D H D H D, nearly N(0, I);
    "published": QR without the sign fix, as the published codes do: positive features are biased by tens of per cent.
    seed: an int or a 0-d int64 array. The same rows for any number of heads; more features begin with the fewer.
    out: a float32 array to fill, which also decides framework and device; default numpy.
    """
    for name, value in (("num_features", num_features), ("dim", dim), ("heads", heads)):
        if name == "heads" and value is None:
            continue
        extent("orthogonal_projection", name, value, 1 if name == "dim" else 0)
    shape = (num_features, dim) if heads is None else (heads, num_features, dim)
    if out is None:
        out = np.empty(shape, np.float32)
    elif framework_of("orthogonal_projection", "out", out) is Jax:
        raise TypeError("[orthogonal_projection] out: expected a writable array, got a jax array, which is immutable")
    elif tuple(out.shape) != shape:
        raise ValueError(f"[orthogonal_projection] out: expected shape {list(shape)}, got {list(out.shape)}")
    _ext.orthogonal_projection(seed, kind, out if heads is not None else out[None])
    return out


def linear_attention(
    fq: Array,
    fk: Array,
    v: Array,
    *,
    is_causal: bool = False,
    normalize: bool = True,
    log_features: bool = False,
    key_log_weight: Array = None,
    key_mask: Array = None,
    gate: Array = None,
    decay: Array = None,
    state: Any = None,
    return_state: bool = False,
    out: Array = None,
) -> Any:
    """Attention by features: out_n = fq_n S / (fq_n z) with S = sum_m fk_m v_m^T and z = sum_m fk_m, in time O(N F E).

    is_causal: sums over m <= n + (M - N), carried along in chunks. gate g [B, Hkv, M] in [0, 1] (causal):
    S <- g_m S + (1 - g_m) fk_m v_m^T; decay d [B, Hkv, M] or [Hkv] (causal): S <- d_m S + fk_m v_m^T; z likewise.

    fq [B, H, N, F], fk [B, Hkv, M, F], v [B, Hkv, M, E]; H a multiple of Hkv. fq and fk share a dtype, v and the result
        theirs.
    normalize=False: out_n = fq_n S (as in Lightning Attention-2 or simple GLA); neither log_features nor
        key_log_weight.
    log_features: fq and fk are logarithms; the sums are stabilised exactly, without an epsilon.
    key_log_weight [B, Hkv, M] float32 multiplies fk_m by its exponential, stabilised likewise.
    key_mask [B, M] bool, True = keep: a masked key is passed over, with its gate or decay, and may hold NaN.
    state, return_state (causal): (S [B, Hkv, F, E], z [B, Hkv, F], shift [B, Hkv, F] or None), float32, standing for
        S e^shift and z e^shift; shift goes with log_features and key_log_weight. A call cut in two, with the state
        handed on, equals one call.
    Returns [B, H, N, E] like v, then the state if asked for. A query that sees no key gives 0.
    """
    call, keywords, parts = _linear_call("linear_attention", locals())
    batch, heads, seq, width = call.shape("fq", "B H N F")
    heads_kv, dim_v = call.shape("v", "B Hkv M E")[1], call.shape("v", "B Hkv M E")[3]
    out = call.out(out, (batch, heads, seq, dim_v), "v")
    shapes = [(batch, heads_kv, width, dim_v), (batch, heads_kv, width), (batch, heads_kv, width)]
    shifted = log_features is True or key_log_weight is not None
    wanted = call.wants_state(return_state, keywords["is_causal"])
    made = [call.empty(shape, "v", "float32") if wanted else None for shape in shapes]
    made[2] = made[2] if shifted else None
    a = call.arrays
    _ext.linear_attention(a["fq"], a["fk"], a["v"], keywords, parts, out, made)
    if not wanted:
        return call.leave(out)
    left = [None if part is None else call.leave(part) for part in made]
    return call.leave(out), tuple(left)


def linear_attention_bwd(
    dout: Array,
    fq: Array,
    fk: Array,
    v: Array,
    *,
    is_causal: bool = False,
    normalize: bool = True,
    log_features: bool = False,
    key_log_weight: Array = None,
    key_mask: Array = None,
    gate: Array = None,
    decay: Array = None,
    state: Any = None,
) -> tuple[Array, ...]:
    """Gradients dfq, dfk, dv of linear_attention for dout [B, H, N, E], and those of key_log_weight, gate and decay
    where they are given. With log_features dfq and dfk are for the logarithms. The state is a constant."""
    call, keywords, parts = _linear_call("linear_attention_bwd", locals(), dout=dout)
    call.shape("dout", "B H N E")
    gradients = [call.empty(call.shape(name, "B H N D"), name) for name in ("fq", "fk", "v")]
    batch, heads_kv, seq, _ = call.shape("v", "B Hkv M E")
    extra = [
        None if x is None else call.empty((batch, heads_kv, seq), "v", "float32")
        for x in (key_log_weight, gate if decay is None else decay)
    ]
    a = call.arrays
    _ext.linear_attention_bwd(a["dout"], a["fq"], a["fk"], a["v"], keywords, parts, *gradients, *extra)
    if extra[1] is not None and keywords["decay_axes"] == 1:
        extra[1] = extra[1].sum((0, 2))
    return call.leave(*gradients, *(x for x in extra if x is not None))


def _linear_call(op: str, given: dict[str, Any], **arrays: Array) -> tuple[Call, dict[str, Any], list[Array]]:
    """The call, its keywords and the parts of its state."""
    call = Call(op, v=given["v"], fq=given["fq"], fk=given["fk"], **arrays)
    batch, heads_kv, seq, _ = call.shape("v", "B Hkv M E")
    call.shape("fk", "B Hkv M F")
    side = ("key_log_weight", "key_mask", "gate", "decay")
    names = (*side, "is_causal", "normalize", "log_features")
    keywords = call.keywords({name: given[name] for name in names}, *side)
    decay = keywords["decay"]
    keywords["decay_axes"] = 0 if decay is None else decay.ndim
    if decay is not None and decay.ndim == 1:
        if tuple(decay.shape) != (heads_kv,):
            got = list(decay.shape)
            raise ValueError(f"[{op}] decay: expected shape [Hkv] = [{heads_kv}] or [B, Hkv, M], got {got}")
        keywords["decay"] = call.framework.broadcast(decay[None, :, None], (batch, heads_kv, seq))
    return call, keywords, state_parts(call, given["state"])


def state_parts(call: Call, state: Any) -> list[Array]:
    """A state (S, z, shift or None) as three arrays or None."""
    parts = call.state(state, ("S", "z", "shift"))
    if state is not None and (parts[0] is None or parts[1] is None):
        raise TypeError(f"[{call.op}] state: expected arrays S and z, got None")
    return [call.enter("state", part) for part in parts]


def sampled_proposals(q: Array, k: Array, indices: Array, noise: Array, *, noise_std: float = 1.0) -> Array:
    """w[b,h,s,n] = q[b,h,n] + k[b,g,indices[b,h,s,n]] + noise_std * noise[b,h,s,n]: the samples of RA.

    q [B, H, N, D], k [B, Hkv, M, D]; indices [B, H, S, N] int32 in -1..M-1 (-1 gives a row of 0); noise
    [1 or B, H, S, N, D] float32. Returns [B, H, S, N, D] float32.
    """
    call = Call("sampled_proposals", q=q, k=k, indices=indices, noise=noise)
    batch, heads, seq, dim = call.shape("q", "B H N D")
    samples = call.shape("indices", "B H S N")[2]
    w = call.empty((batch, heads, samples, seq, dim), "q", "float32")
    a = call.arrays
    _ext.sampled_proposals(a["q"], a["k"], a["indices"], a["noise"], noise_std, w)
    return call.leave(w)


def sampled_proposals_bwd(
    dw: Array, q: Array, k: Array, indices: Array, *, score: Array = None, scale: float | None = None
) -> tuple[Array, Array]:
    """Gradients dq, dk of sampled_proposals for dw [B, H, S, N, D] float32 with the indices fixed.

    score [B, H, S, N] float32, the cotangent of the drawn keys' logits scale <q, k>, adds the score-function term.
    """
    call = Call("sampled_proposals_bwd", q=q, k=k, dw=dw, indices=indices, score=score)
    dq, dk = (call.empty(call.shape(name, "B H N D"), name) for name in ("q", "k"))
    a = call.arrays
    _ext.sampled_proposals_bwd(a["dw"], a["score"], a["q"], a["k"], a["indices"], {"scale": scale}, dq, dk)
    return call.leave(dq, dk)


def mixture_proposals(
    q_bar: Array,
    k_bar: Array,
    noise: Array = None,
    *,
    scale: float | None = None,
    noise_std: float = 1.0,
    antithetic: bool = False,
    mis: str = "opt",
    counts: Array = None,
) -> tuple[Array, Array, Array, Array]:
    """Samples of Gaussian proposals centred at landmarks, and their log-densities: the first half of LARA.

        mu_c = q_bar_c + k_bar_c,    w_j = mu_c(j) + noise_std noise_j,    c(j) = j mod C,
        l_jc = scale <w_j, mu_c> - scale |mu_c|^2 / 2,    m_j = ln sum_c e^l_jc

    q_bar [B, H, C, D], k_bar [B, Hkv, C, D]. noise [1 or B, H, J, D] float32, J a multiple of C; None: no noise, J = C;
        with antithetic it has J / 2 rows, which come again negated.
    counts [B, C] int32: landmark c exists where counts > 0.
    Returns, all float32, w [B, H, J, D]; keys [B, H, J, D] = w_j + mu_c(j) for mis="biased", else None; log_density
    [B, H, J]: l_{j,c(j)} for "opt", else m_j, and +inf where the landmark does not exist; balance [B, H, J] =
    e^(l_{j,c(j)} - m_j) C / J for "opt", else None.
    """
    call = Call("mixture_proposals", q_bar=q_bar, k_bar=k_bar, noise=noise)
    batch, heads, landmarks, dim = call.shape("q_bar", "B H C D")
    samples = landmarks if noise is None else call.shape("noise", "B H J D")[2] * (2 if antithetic is True else 1)
    w = call.empty((batch, heads, samples, dim), "q_bar", "float32")
    keys = call.empty((batch, heads, samples, dim), "q_bar", "float32") if mis == "biased" else None
    density = call.empty((batch, heads, samples), "q_bar", "float32")
    balance = call.empty((batch, heads, samples), "q_bar", "float32") if mis == "opt" else None
    given = {"scale": scale, "noise_std": noise_std, "antithetic": antithetic, "mis": mis, "counts": counts}
    a = call.arrays
    _ext.mixture_proposals(
        a["q_bar"], a["k_bar"], a["noise"], call.keywords(given, "counts"), w, keys, density, balance
    )
    results = (None if x is None else call.leave(x) for x in (w, keys, density, balance))
    return tuple(results)  # type: ignore[return-value]


def mixture_proposals_bwd(
    q_bar: Array,
    k_bar: Array,
    noise: Array = None,
    *,
    dw: Array = None,
    dkeys: Array = None,
    dlog_density: Array = None,
    dbalance: Array = None,
    scale: float | None = None,
    noise_std: float = 1.0,
    antithetic: bool = False,
    mis: str = "opt",
    counts: Array = None,
) -> Array:
    """The gradient dmu [B, H, C, D] float32 of mixture_proposals for the cotangents of its results: that of q_bar, and
    summed over the heads of a group that of k_bar."""
    cotangents = {"dw": dw, "dkeys": dkeys, "dlog_density": dlog_density, "dbalance": dbalance}
    call = Call("mixture_proposals_bwd", q_bar=q_bar, k_bar=k_bar, noise=noise, **cotangents)
    dmu = call.empty(call.shape("q_bar", "B H C D"), "q_bar", "float32")
    given = {"scale": scale, "noise_std": noise_std, "antithetic": antithetic, "mis": mis, "counts": counts}
    a = call.arrays
    keywords = call.keywords(given, "counts")
    _ext.mixture_proposals_bwd(
        a["dw"], a["dkeys"], a["dlog_density"], a["dbalance"], a["q_bar"], a["k_bar"], a["noise"], keywords, dmu
    )
    return call.leave(dmu)


def mixture_weights(
    q: Array,
    q_bar: Array,
    balance: Array,
    *,
    column_lse: Array = None,
    scale: float | None = None,
    alpha_coeff: float = 1.0,
    query_mask: Array = None,
    counts: Array = None,
) -> Array:
    """Log-weights with which each query combines the samples of a mixture: LARA's optimal rule.

        log_alpha_nj = ln max(1e-8, balance_j + alpha_coeff (t_nc - mean_c' t_nc')),    c = j mod C

    t_nc = e^(scale <q_bar_c, q_n> - column_lse_c), a softmax over the queries, where column_lse [B, H, C] is given;
        else the softmax over the landmarks c.
    q [B, H, N, D], q_bar [B, H, C, D], balance [B, H, J]. A masked query gives a row of -inf.
    Returns [B, H, N, J] float32.
    """
    call = Call("mixture_weights", q=q, q_bar=q_bar, balance=balance, column_lse=column_lse)
    batch, heads, seq, _ = call.shape("q", "B H N D")
    log_alpha = call.empty((batch, heads, seq, call.shape("balance", "B H J")[2]), "q", "float32")
    given = {"scale": scale, "alpha_coeff": alpha_coeff, "query_mask": query_mask, "counts": counts}
    a = call.arrays
    keywords = call.keywords(given, "query_mask", "counts")
    _ext.mixture_weights(a["q"], a["q_bar"], a["column_lse"], a["balance"], keywords, log_alpha)
    return call.leave(log_alpha)


def mixture_weights_bwd(
    dlog_alpha: Array,
    q: Array,
    q_bar: Array,
    balance: Array,
    *,
    column_lse: Array = None,
    scale: float | None = None,
    alpha_coeff: float = 1.0,
    query_mask: Array = None,
    counts: Array = None,
) -> tuple[Array, Array, Array]:
    """Gradients dq, dq_bar (float32) and dbalance of mixture_weights, through column_lse too, for dlog_alpha."""
    call = Call("mixture_weights_bwd", q=q, q_bar=q_bar, balance=balance, column_lse=column_lse, dlog_alpha=dlog_alpha)
    dq = call.empty(call.shape("q", "B H N D"), "q")
    dq_bar = call.empty(call.shape("q_bar", "B H C D"), "q_bar", "float32")
    dbalance = call.empty(call.shape("balance", "B H J"), "balance")
    given = {"scale": scale, "alpha_coeff": alpha_coeff, "query_mask": query_mask, "counts": counts}
    a = call.arrays
    keywords = call.keywords(given, "query_mask", "counts")
    _ext.mixture_weights_bwd(
        a["dlog_alpha"], a["q"], a["q_bar"], a["column_lse"], a["balance"], keywords, dq, dq_bar, dbalance
    )
    return call.leave(dq, dq_bar, dbalance)
