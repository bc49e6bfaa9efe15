"""Calls of YOSO attention against its float64 reference, for the tests of every framework and device."""

import numpy as np

import subquad
from cases import CASES, arrays, as_dtype
from ref import yoso_attention as ref
from tolerance import assert_budget, redrawn_floor, round_to

BY_NAME = {case.name: case for case in CASES}
METHOD = {
    "hadamard": dict(num_hashes=5, hash_bits=4, seed=3),
    "published": dict(num_hashes=9, hash_bits=5, seed=3, carving="published"),
    "gaussian": dict(num_hashes=6, hash_bits=3, seed=3, hashing="gaussian"),
    "wide_codes": dict(num_hashes=3, hash_bits=18, seed=3),
    "expectation": dict(hash_bits=5, expectation=True),
    "raw": dict(num_hashes=5, hash_bits=4, seed=3, normalize=False),
}


def library_codes(q, k, keywords):
    """The library's own codes: Gaussian ones may differ from the reference's on near ties, which is its own test."""
    hashing = dict(num_hashes=32, hash_bits=8, hashing="hadamard", carving="strided", seed=0) | keywords
    if hashing.get("expectation"):
        return None
    heads_kv, dim, m, tau = k.shape[1], q.shape[3], hashing["num_hashes"], hashing["hash_bits"]
    if hashing["hashing"] == "gaussian":
        planes = subquad.random_normal((heads_kv, m * tau, dim), seed=hashing["seed"], stream=1)
        planes = planes.reshape(heads_kv, m, tau, dim)
        return tuple(subquad.lsh_hash(x, planes).astype(np.int32) for x in (q, k))
    padded = subquad._ext.hadamard_padded(dim)
    parts = subquad._ext.hadamard_parts(m, tau, dim, hashing["carving"])
    signs = subquad.random_signs((heads_kv, 3 * parts, padded), seed=hashing["seed"], stream=2)
    signs = signs.reshape(heads_kv, 3, parts, padded)
    hashed = (subquad.lsh_hash(x, signs=signs, num_hashes=m, hash_bits=tau, carving=hashing["carving"]) for x in (q, k))
    return tuple(codes.astype(np.int32) for codes in hashed)


def _made(framework, masks):
    return {name: framework.make(m) if isinstance(m, np.ndarray) else m for name, m in masks.items()}


def check_forward(case, keywords, dtype="float32", framework=None, function=None):
    """`function` (default: the plain one) with arrays of the framework (default: numpy) against the reference."""
    q, k, v, masks = arrays(case, dtype=dtype)
    codes = library_codes(q, k, keywords)
    function = function or subquad.yoso_attention
    if framework is None:
        out = np.asarray(function(q, k, v, **keywords, **masks), np.float32)
    else:
        out = framework.read(function(*framework.arrays(q, k, v), **keywords, **_made(framework, masks)))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact = ref.yoso_attention(*wide, **keywords, **masks, codes=codes)
    plain = ref.yoso_attention(*wide, **keywords, **masks, codes=codes, dtype=np.float32)
    call = dict(keywords, **masks, codes=codes, dtype=np.float32)
    (floor,) = redrawn_floor(lambda q, k: ref.yoso_attention(q, k, wide[2], **call), *wide[:2], exact)
    # the order of the sum over the keys is the kernel's own, as in the test of bucket_attention
    floor = max(floor, 1e-7 * np.abs(exact).max(initial=0) * case.seq_k**0.5)
    assert_budget(out, exact, round_to(plain, dtype), dtype=dtype, floor=floor, what=f"out of {case}")


def _pull_back_floors(dout, q, k, v, keywords, codes):
    """What one rounding in every column of the gradient of the un-normalised sum does to dq, dk and dv: all there is of
    them where dout is along the output, as with one key a query."""
    if not keywords.get("normalize", True):
        return 0.0, 0.0, 0.0
    raw = dict(keywords, normalize=False, codes=codes)
    length = np.linalg.norm(ref.yoso_attention(q, k, v, **raw), axis=-1, keepdims=True)
    dsum = np.divide(dout, length, out=np.zeros_like(dout), where=length > 0)
    rounding = 2.0**-23 * v.shape[3] ** 0.5
    return tuple(rounding * np.abs(x).max(initial=0) for x in ref.yoso_attention_bwd(dsum, q, k, v, **raw))


def check_backward(case, keywords, dtype="float32", saved=False, framework=None, function=None):
    """The gradients of `function(dout, q, k, v, ...)`, by default the plain one, against the reference."""
    q, k, v, masks = arrays(case, dtype=dtype)
    codes = library_codes(q, k, keywords)
    rng = np.random.default_rng(1)
    dout = as_dtype(rng.standard_normal((case.batch, case.heads, case.seq_q, case.dim_v)), dtype)
    given = {}
    if saved:
        given["out"], given["lse"] = subquad.yoso_attention(q, k, v, **keywords, **masks, return_lse=True)
    function = function or subquad.yoso_attention_bwd
    if framework is None:
        got = function(dout, q, k, v, **keywords, **masks, **given)
    else:
        got = function(*framework.arrays(dout, q, k, v), **keywords, **_made(framework, masks | given))
        assert [framework.dtype(x) for x in got] == [dtype] * 3
        got = [framework.read(x) for x in got]
    wide = [x.astype(np.float64) for x in (dout, q, k, v)]
    exact = ref.yoso_attention_bwd(*wide, **keywords, **masks, codes=codes)
    plain = ref.yoso_attention_bwd(*wide, **keywords, **masks, codes=codes, dtype=np.float32)
    call = dict(keywords, **masks, codes=codes, dtype=np.float32)
    again = lambda q, k: ref.yoso_attention_bwd(wide[0], q, k, wide[3], **call)  # noqa: E731
    floors = redrawn_floor(again, *wide[1:3], exact, gradients=(0, 1))
    floors = [max(pair) for pair in zip(floors, _pull_back_floors(*wide, keywords | masks, codes), strict=True)]
    for name, actual, truth, rounded, floor, like in zip(
        ("dq", "dk", "dv"), got, exact, plain, floors, (q, k, v), strict=True
    ):
        assert actual.shape == like.shape and (framework or actual.dtype == like.dtype)
        actual, rounded = np.asarray(actual, np.float32), round_to(rounded, dtype)
        assert_budget(actual, truth, rounded, dtype=dtype, floor=floor, what=f"{name} {case}")
