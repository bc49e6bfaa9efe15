"""One table of bad inputs: each gives one clear sentence, before any work, in the grammar of the library."""

import numpy as np
import pytest

import subquad

F = np.float32


def ok(**changes):
    arrays = dict(q=np.ones((2, 4, 5, 8), F), k=np.ones((2, 2, 6, 8), F), v=np.ones((2, 2, 6, 3), F))
    return arrays | changes


def run(**changes):
    keywords = ok(**changes)
    return subquad.yoso_attention(keywords.pop("q"), keywords.pop("k"), keywords.pop("v"), **keywords)


def run_bwd(**changes):
    keywords = ok(dout=np.ones((2, 4, 5, 3), F)) | changes
    positional = [keywords.pop(name) for name in ("dout", "q", "k", "v")]
    return subquad.yoso_attention_bwd(*positional, **keywords)


def overlapping():
    base = np.ones((2, 4, 5, 8 + 3), F)
    return dict(q=base[..., :8], out=base[..., 8:])


METHOD_ERRORS = [
    (TypeError, "q: expected an array (numpy, torch, cupy or jax), got list", dict(q=[[1.0]])),
    (TypeError, "q: expected an array (numpy, torch, cupy or jax), got NoneType", dict(q=None)),
    (TypeError, "k: expected an array", dict(k=3.0)),
    (TypeError, "float64", dict(q=np.ones((2, 4, 5, 8)))),
    (TypeError, "k: expected dtype float32, got float16", dict(k=np.ones((2, 2, 6, 8), np.float16))),
    (TypeError, "q: expected dtype float32 or float16 or bfloat16, got int32", dict(q=np.ones((2, 4, 5, 8), np.int32))),
    (ValueError, "q: expected shape [B, H, N, D], got [4, 5, 8]", dict(q=np.ones((4, 5, 8), F))),
    (ValueError, "k: expected shape [B, Hkv, M, D]", dict(k=np.ones((2, 2, 6, 9), F))),
    (ValueError, "k: expected shape [B, Hkv, M, D]", dict(k=np.ones((3, 2, 6, 8), F))),
    (ValueError, "v: expected shape [B, Hkv, M, E]", dict(v=np.ones((2, 2, 7, 3), F))),
    (ValueError, "v: expected shape [B, Hkv, M, E]", dict(v=np.ones((2, 1, 6, 3), F))),
    (ValueError, "k: expected a number of heads that divides the 4 query heads, got 3",
     dict(k=np.ones((2, 3, 6, 8), F), v=np.ones((2, 3, 6, 3), F))),
    (ValueError, "q: expected a head dimension of at least 1, got 0",
     dict(q=np.ones((2, 4, 5, 0), F), k=np.ones((2, 2, 6, 0), F))),
    (ValueError, "q: expected a contiguous last axis", dict(q=np.ones((2, 4, 5, 16), F)[..., ::2])),
    (ValueError, "key_mask: expected shape [B, M] = [2, 6], got [2, 5]", dict(key_mask=np.ones((2, 5), bool))),
    (TypeError, "key_mask: expected dtype bool, got float32", dict(key_mask=np.ones((2, 6), F))),
    (TypeError, "query_mask: expected dtype bool, got int64", dict(query_mask=np.ones((2, 5), np.int64))),
    (ValueError, "query_mask: expected shape [B, N] = [2, 5], got [2, 6]", dict(query_mask=np.ones((2, 6), bool))),
    (ValueError, "num_hashes: expected a value in [1, 65536], got 0", dict(num_hashes=0)),
    (TypeError, "num_hashes: expected an integer, got float", dict(num_hashes=16.0)),
    (TypeError, "num_hashes: expected an integer, got bool", dict(num_hashes=True)),
    (TypeError, "num_hashes: expected an integer, got ndarray", dict(num_hashes=np.ones(2, int))),
    (ValueError, "hash_bits: expected a value in [1, 24], got 25", dict(hash_bits=25)),
    (ValueError, 'hashing: expected "hadamard" or "gaussian", got "fast"', dict(hashing="fast")),
    (TypeError, 'hashing: expected "hadamard" or "gaussian", got int', dict(hashing=1)),
    (ValueError, 'carving: expected "strided" or "published", got "x"', dict(carving="x")),
    (ValueError, "grad: expected", dict(grad="best")),
    (ValueError, "grad: expected", dict(grad="sampled", expectation=True)),
    (TypeError, "is_causal: expected True or False, got int", dict(is_causal=1)),
    (TypeError, "normalize: expected True or False, got NoneType", dict(normalize=None)),
    (TypeError, "seed: expected", dict(seed=1.5)),
    (TypeError, "seed: expected", dict(seed="7")),
    (ValueError, "seed: expected", dict(seed=2**64)),
    (ValueError, "planes: expected shape", dict(planes=np.ones((3, 4, 9), F))),
    (TypeError, "planes: expected dtype float32", dict(planes=np.ones((3, 4, 8), np.float16))),
    (ValueError, "planes: expected a leading axis of 1 or Hkv = 2, got 4", dict(planes=np.ones((4, 3, 4, 8), F))),
    (ValueError, "num_hashes: expected 3 as in planes, got 5", dict(planes=np.ones((3, 4, 8), F), num_hashes=5)),
    (ValueError, "signs: expected planes or signs, got both",
     dict(planes=np.ones((3, 4, 8), F), signs=np.ones((3, 1, 64), F))),
    (ValueError, "signs: expected shape", dict(signs=np.ones((3, 1, 64), F))),
    (ValueError, 'signs: expected planes with hashing="gaussian"',
     dict(signs=np.ones((3, 4, 64), F), hashing="gaussian")),
    (ValueError, "planes: expected none with expectation=True", dict(planes=np.ones((3, 4, 8), F), expectation=True)),
    (ValueError, "out: expected shape [B, H, N, E]", dict(out=np.ones((2, 4, 5, 8), F))),
    (TypeError, "out: expected dtype float32, got float16", dict(out=np.ones((2, 4, 5, 3), np.float16))),
    (ValueError, "out: expected an output that shares no memory", overlapping()),
    (ValueError, "out: expected an output whose elements have memory of their own",
     dict(out=np.lib.stride_tricks.as_strided(np.ones(3, F), (2, 4, 5, 3), (0, 0, 0, 4), writeable=True))),
    (ValueError, "lse: expected normalize=True", dict(return_lse=True, normalize=False)),
    (subquad.UnsupportedError, "512", dict(v=np.ones((2, 2, 6, 513), F))),
    (subquad.UnsupportedError, "512", dict(v=np.ones((2, 2, 6, 513), F), expectation=True)),
    (subquad.UnsupportedError, "512", dict(q=np.ones((2, 4, 5, 600), F), k=np.ones((2, 2, 6, 600), F))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), METHOD_ERRORS, ids=[m[:48] for _, m, _ in METHOD_ERRORS])
def test_yoso_attention(error, message, changes):
    with pytest.raises(error) as caught:
        run(**changes)
    text = str(caught.value)
    assert text.startswith("[yoso_attention] ") or error is subquad.UnsupportedError
    assert message in text and "\n" not in text


BACKWARD_ERRORS = [
    (
        ValueError,
        "dout: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 8]",
        dict(dout=np.ones((2, 4, 5, 8), F)),
    ),
    (TypeError, "dout: expected dtype float32", dict(dout=np.ones((2, 4, 5, 3), np.float16))),
    (ValueError, "lse: expected none with normalize=False", dict(lse=np.ones((2, 4, 5), F), normalize=False)),
    (ValueError, "lse: expected shape [B, H, N]", dict(lse=np.ones((2, 4, 6), F))),
    (ValueError, "grad: expected", dict(grad="sampled", expectation=True)),
]


@pytest.mark.parametrize(("error", "message", "changes"), BACKWARD_ERRORS, ids=[m[:48] for _, m, _ in BACKWARD_ERRORS])
def test_yoso_attention_bwd(error, message, changes):
    with pytest.raises(error) as caught:
        run_bwd(**changes)
    assert str(caught.value).startswith("[yoso_attention_bwd] ") and message in str(caught.value)


X = np.ones((1, 2, 5, 8), F)
CODES = np.ones((1, 2, 3, 5), np.uint16)
OPERATOR_ERRORS = [
    (ValueError, "[lsh_hash] planes: expected planes or signs, got neither", lambda: subquad.lsh_hash(X)),
    (ValueError, "[lsh_hash] planes: expected planes or signs, got both",
     lambda: subquad.lsh_hash(X, np.ones((1, 1, 8), F), signs=np.ones((3, 1, 64), F))),
    (ValueError, "[lsh_hash] planes: expected shape", lambda: subquad.lsh_hash(X, np.ones((1, 1, 9), F))),
    (ValueError, "[lsh_hash]", lambda: subquad.lsh_hash(X, np.ones((3, 1, 1, 8), F))),
    (ValueError, "hash_bits", lambda: subquad.lsh_hash(X, np.ones((1, 25, 8), F))),
    (ValueError, "[lsh_hash] signs: expected num_hashes and hash_bits",
     lambda: subquad.lsh_hash(X, signs=np.ones((3, 1, 64), F))),
    (ValueError, "signs: expected shape",
     lambda: subquad.lsh_hash(X, signs=np.ones((3, 9, 64), F), num_hashes=2, hash_bits=8)),
    (ValueError, "num_buckets", lambda: subquad.bucket_sort(CODES, 0)),
    (TypeError, "num_buckets", lambda: subquad.bucket_sort(CODES, 2.0)),
    (ValueError, "codes", lambda: subquad.bucket_sort(CODES, 1)),
    (TypeError, "codes", lambda: subquad.bucket_sort(X, 4)),
    (ValueError, "codes_q", lambda: subquad.bucket_attention(CODES, CODES * 0, X, 1)),
    (ValueError, "codes_k", lambda: subquad.bucket_attention(CODES * 0, CODES, X, 1)),
    (ValueError, "codes_k",
     lambda: subquad.bucket_attention(CODES.astype(np.int32) * 0, -CODES.astype(np.int32), X, 4)),
    (TypeError, "codes_k", lambda: subquad.bucket_attention(CODES, CODES.astype(np.int32), X, 4)),
    (ValueError, "scale", lambda: subquad.bucket_attention(CODES, CODES, X, 4, scale=np.nan)),
    (TypeError, "scale: expected a number, got str", lambda: subquad.bucket_attention(CODES, CODES, X, 4, scale="1")),
    (ValueError, "v: expected shape", lambda: subquad.bucket_attention(CODES, CODES, X[:, :, :4], 4)),
    (ValueError, "hash_bits", lambda: subquad.collision_attention(X, X, X, 0)),
    (ValueError, 'grad: expected "exact" or "lower_bound", got "sampled"',
     lambda: subquad.collision_attention_bwd(X, X, X, X, 4, grad="sampled")),
    (ValueError, "num_samples", lambda: subquad.bucket_gradient(X, X, X, X, CODES, CODES, 4, num_samples=0)),
    (ValueError, "codes_q", lambda: subquad.bucket_gradient(X, X, X, X, CODES + 16, CODES, 4)),
    (ValueError, "[l2_normalize] x: expected shape [B, H, N, D], got [8]", lambda: subquad.l2_normalize(np.ones(8, F))),
    (TypeError, "return_lse: expected True or False, got str", lambda: subquad.l2_normalize(X, return_lse="no")),
    (ValueError, "out", lambda: subquad.l2_normalize(X, out=np.lib.stride_tricks.as_strided(X, X.shape, (0, 0, 0, 4)))),
    (ValueError, "[random_uniform] shape", lambda: subquad.random_uniform((-1, 2), seed=0)),
    (TypeError, "[random_uniform] shape", lambda: subquad.random_uniform("ab", seed=0)),
    (ValueError, "[random_normal] stream", lambda: subquad.random_normal((2,), seed=0, stream=-1)),
    (TypeError, "[random_normal] out", lambda: subquad.random_normal((2,), seed=0, out=np.zeros(2, np.float16))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), OPERATOR_ERRORS, ids=[m[:48] for _, m, _ in OPERATOR_ERRORS])
def test_operators(error, message, call):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value) and str(caught.value).startswith("[")


def test_frameworks_do_not_mix():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(TypeError, match=r"\[yoso_attention\] k: expected an array of the same framework as q"):
        run(k=torch.ones(2, 2, 6, 8))
    with pytest.raises(TypeError, match="key_mask: expected an array of the same framework"):
        run(key_mask=torch.ones(2, 6, dtype=torch.bool))


def test_other_devices_are_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    meta = torch.ones(2, 4, 5, 8, device="meta")
    with pytest.raises((TypeError, subquad.UnsupportedError), match=r"\[yoso_attention\] q"):
        run(q=meta, k=torch.ones(2, 2, 6, 8), v=torch.ones(2, 2, 6, 3))


def test_jax_outputs_and_tracers_are_refused():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.ones((1, 2, 5, 8))
    with pytest.raises(TypeError, match=r"\[yoso_attention\] out: expected None for jax arrays"):
        subquad.yoso_attention(x, x, x, out=x)
    with pytest.raises(TypeError, match="use subquad.jax"):
        jax.jit(lambda a: subquad.yoso_attention(a, a, a))(x)


def test_a_failed_call_leaves_out_alone():
    out = np.full((2, 4, 5, 3), 7, F)
    with pytest.raises(ValueError):
        run(out=out, num_hashes=0)
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["sse9", "x86_64_v5", "", "neon;"])
def test_unknown_rows(name):
    before = subquad.cpu.isa()
    with pytest.raises(ValueError, match="isa: expected one of"):
        subquad.cpu.set_isa(name)
    assert subquad.cpu.isa() == before
