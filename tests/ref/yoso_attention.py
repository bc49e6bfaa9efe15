"""Bernoulli sampling attention, composed from its operators, and what theory says about its distribution.

    sampled:      X_i = (1/R) sum_r sum_{j visible, code equal} v_j
    expectation:  X_i = sum_{j visible} u(x_ij)^tau v_j
    out_i = X_i / ||X_i|| if normalize, 0 where X_i = 0

Source: Zeng et al., ICML 2021.
"""

import numpy as np

from .bucket_attention import bucket_attention, bucket_attention_bwd
from .bucket_gradient import bucket_gradient
from .collision_attention import agreement, collision_attention, collision_attention_bwd, cosines
from .l2_normalize import l2_normalize, l2_normalize_bwd
from .lsh_hash import draw_planes, draw_signs, lsh_hash, lsh_hash_hadamard
from .pairs import repeat_heads, visible_pairs

NUM_SAMPLES = 4  # candidates that the sampled gradients take from a bucket


def yoso_codes(
    q, k, *, num_hashes=32, hash_bits=8, hashing="hadamard", carving="strided", planes=None, signs=None, seed=0
):
    """-> codes_q [B, H, R, N], codes_k [B, Hkv, R, M]. Hadamard codes are float32's: its roundings are contract."""
    if planes is not None or (hashing == "gaussian" and signs is None):
        if planes is None:
            planes = draw_planes(k.shape[1], num_hashes, hash_bits, q.shape[-1], seed)
        return lsh_hash(q, planes), lsh_hash(k, planes)
    if signs is None:
        signs = draw_signs(k.shape[1], num_hashes, hash_bits, q.shape[-1], carving, seed)
    return tuple(lsh_hash_hadamard(x, signs, num_hashes, hash_bits, carving, np.float32) for x in (q, k))


def sampling_sum(q, k, v, hash_bits, expectation, codes, dtype, visibility, hashing):
    """-> X, codes, hash_bits; the counts follow the planes where these are given."""
    if expectation:
        return collision_attention(q, k, v, hash_bits, dtype=dtype, **visibility), None, hash_bits
    if hashing.get("planes") is not None:
        hash_bits = np.shape(hashing["planes"])[-2]
    codes = yoso_codes(q, k, hash_bits=hash_bits, **hashing) if codes is None else codes
    scale = 1 / codes[0].shape[2]
    return bucket_attention(*codes, v, scale=scale, dtype=dtype, **visibility), codes, hash_bits


def yoso_attention(
    q, k, v, *, num_hashes=32, hash_bits=8, hashing="hadamard", carving="strided", planes=None, signs=None,
    expectation=False, key_mask=None, query_mask=None, is_causal=False, normalize=True, seed=0, grad=None,
    codes=None, dtype=np.float64,
):  # fmt: skip
    """q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E] -> [B, H, N, E]. codes: (codes_q, codes_k), else hashed."""
    visibility = dict(key_mask=key_mask, query_mask=query_mask, is_causal=is_causal)
    draws = dict(num_hashes=num_hashes, hashing=hashing, carving=carving, planes=planes, signs=signs, seed=seed)
    x, _, _ = sampling_sum(q, k, v, hash_bits, expectation, codes, dtype, visibility, draws)
    return l2_normalize(x, dtype)[0] if normalize else x


def yoso_attention_bwd(
    dout, q, k, v, *, num_hashes=32, hash_bits=8, hashing="hadamard", carving="strided", planes=None, signs=None,
    expectation=False, key_mask=None, query_mask=None, is_causal=False, normalize=True, seed=0, grad=None,
    codes=None, dtype=np.float64,
):  # fmt: skip
    """-> dq, dk, dv. grad: "sampled" | "sampled_exact" | "lower_bound" | "exact"."""
    grad = grad or ("exact" if expectation else "sampled")
    assert grad in ("exact", "lower_bound") or (grad in ("sampled", "sampled_exact") and not expectation)
    visibility = dict(key_mask=key_mask, query_mask=query_mask, is_causal=is_causal)
    draws = dict(num_hashes=num_hashes, hashing=hashing, carving=carving, planes=planes, signs=signs, seed=seed)
    x, codes, hash_bits = sampling_sum(q, k, v, hash_bits, expectation, codes, dtype, visibility, draws)
    g = l2_normalize_bwd(dout, *l2_normalize(x, dtype), dtype) if normalize else np.asarray(dout).astype(dtype)

    if grad in ("exact", "lower_bound"):
        dq, dk, dv = collision_attention_bwd(g, q, k, v, hash_bits, grad=grad, dtype=dtype, **visibility)
    else:
        rule = "lower_bound" if grad == "sampled" else "exact"
        sampling = dict(rule=rule, num_samples=NUM_SAMPLES, seed=seed)
        dq, dk = bucket_gradient(g, q, k, v, *codes, hash_bits, dtype=dtype, **sampling, **visibility)
    if not expectation:
        dv = bucket_attention_bwd(g, *codes, scale=1 / codes[0].shape[2], dtype=dtype, **visibility)
    return dq, dk, dv


def collision_probability(x, tau):
    """P[codes of tau independent bits are equal] for two vectors of cosine x."""
    return agreement(np.asarray(x, np.float64)) ** tau


def sampled_variance(q, k, v, hash_bits, num_hashes, *, key_mask=None, query_mask=None, is_causal=False):
    """Var[X_ic] over the draw of Gaussian planes -> [B, H, N, E].

    Var[X_ic] = (1/R) (sum_{j,l} P3_ijl v_jc v_lc - (sum_j p_ij v_jc)^2),
    P3_ijl = (1 - (a_ij + a_il + a_jl) / (2 pi))^tau,
    with a the angles: three vectors lie on one side of a plane with probability 1 - (sum of their angles) / (2 pi).
    """
    heads = q.shape[1]
    seen = visible_pairs(q.shape[0], q.shape[2], k.shape[2], key_mask, query_mask, is_causal)
    qhat, khat = l2_normalize(q)[0], repeat_heads(l2_normalize(k)[0], heads)
    v = repeat_heads(np.asarray(v, np.float64), heads)
    every = np.ones((1, 1, 1, 1), bool)
    angle_qk, angle_kk = np.arccos(cosines(qhat, khat, every)), np.arccos(cosines(khat, khat, every))
    variance = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, i in np.ndindex(q.shape[:3]):
        j = np.nonzero(seen[b, 0, i])[0]
        angle, values = angle_qk[b, h, i, j], v[b, h, j]
        between = angle_kk[b, h][np.ix_(j, j)] * (1 - np.eye(len(j)))
        triple = np.maximum(0, 1 - (angle[:, None] + angle[None, :] + between) / (2 * np.pi)) ** hash_bits
        mean = (1 - angle / np.pi) ** hash_bits @ values
        variance[b, h, i] = ((values * (triple @ values)).sum(axis=0) - mean**2) / num_hashes
    return variance
