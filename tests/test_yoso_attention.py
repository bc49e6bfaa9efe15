"""YOSO attention against its float64 reference, its edges and its laws."""

import numpy as np
import pytest

import subquad
from cases import CASES, DTYPES, Case, arrays, as_dtype, strided
from ref import yoso_attention as ref
from tolerance import EPS
from yoso_checks import BY_NAME, METHOD, check_backward, check_forward, library_codes

# Matches the reference


@pytest.mark.backends
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHOD)
def test_forward_matches_the_reference(case, method, isa):
    check_forward(case, METHOD[method])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["hadamard", "gaussian", "expectation"])
def test_forward_in_every_dtype_and_framework(dtype, method, framework):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    for name in ("tails", "masked_grouped", "causal_masked_grouped"):
        check_forward(BY_NAME[name], METHOD[method], dtype, framework)


@pytest.mark.backends
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["hadamard", "gaussian", "expectation"])
def test_forward_in_16_bits(dtype, method, isa):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    check_forward(BY_NAME["causal_masked_grouped"], METHOD[method], dtype)


@pytest.mark.backends
def test_seeded_hashing_is_the_reference_hashing(isa):
    case = BY_NAME["grouped"]
    q, k, v, _ = arrays(case)
    hashing = dict(num_hashes=7, hash_bits=6, hashing="hadamard", carving="strided", planes=None, signs=None, seed=11)
    expected = ref.yoso_codes(q, k, **hashing)
    for codes, exact in zip(library_codes(q, k, dict(num_hashes=7, hash_bits=6, seed=11)), expected, strict=True):
        np.testing.assert_array_equal(codes, exact)


# Gradients

GRADIENTS = [
    ("hadamard", "sampled"),
    ("hadamard", "sampled_exact"),
    ("hadamard", "lower_bound"),
    ("hadamard", "exact"),
    ("gaussian", "sampled"),
    ("wide_codes", "sampled"),
    ("wide_codes", "sampled_exact"),
    ("raw", "sampled"),
    ("expectation", "exact"),
    ("expectation", "lower_bound"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("method", "grad"), GRADIENTS)
def test_backward_matches_the_reference(case, method, grad):
    check_backward(case, METHOD[method] | dict(grad=grad))


@pytest.mark.backends
@pytest.mark.parametrize(("method", "grad"), GRADIENTS)
def test_backward_on_every_row(method, grad, isa):
    for name in ("tails", "masked_grouped", "causal_masked_grouped"):
        check_backward(BY_NAME[name], METHOD[method] | dict(grad=grad))


@pytest.mark.backends
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("method", "grad"), [("hadamard", "sampled"), ("expectation", "exact")])
def test_backward_in_16_bits(dtype, method, grad, isa):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    check_backward(BY_NAME["masked_grouped"], METHOD[method] | dict(grad=grad), dtype)


@pytest.mark.backends
@pytest.mark.parametrize(("method", "grad"), [("hadamard", "sampled"), ("expectation", "exact")])
def test_backward_takes_what_the_forward_saved(method, grad, isa):
    check_backward(BY_NAME["tails"], METHOD[method] | dict(grad=grad), saved=True)


def test_default_gradients():
    q, k, v, _ = arrays(BY_NAME["plain"])
    for keywords, grad in ((METHOD["hadamard"], "sampled"), (METHOD["expectation"], "exact")):
        default = subquad.yoso_attention_bwd(v, q, k, v, **keywords)
        named = subquad.yoso_attention_bwd(v, q, k, v, **keywords, grad=grad)
        for a, b in zip(default, named, strict=True):
            np.testing.assert_array_equal(a, b)


# Edges


@pytest.mark.backends
@pytest.mark.parametrize("method", METHOD)
@pytest.mark.parametrize("empty", ["batch", "heads", "seq_q", "seq_k"])
def test_empty_axes(method, empty, isa):
    sizes = {empty: 0} | (dict(heads_kv=0) if empty == "heads" else {})
    shape = Case("empty", **({"batch": 2, "heads": 2, "heads_kv": 2, "seq_q": 5, "seq_k": 5} | sizes))
    q = np.ones((shape.batch, shape.heads, shape.seq_q, 16), np.float32)
    k = np.ones((shape.batch, shape.heads_kv, shape.seq_k, 16), np.float32)
    out = subquad.yoso_attention(q, k, k, **METHOD[method])
    assert out.shape == q.shape
    np.testing.assert_array_equal(out, 0)
    for grad, like in zip(subquad.yoso_attention_bwd(out, q, k, k, **METHOD[method]), (q, k, k), strict=True):
        assert grad.shape == like.shape
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.backends
@pytest.mark.parametrize("method", ["hadamard", "gaussian", "expectation"])
def test_strides_change_nothing(method, isa):
    case = BY_NAME["tails"]
    q, k, v, _ = arrays(case)
    expected = subquad.yoso_attention(q, k, v, **METHOD[method])
    out = strided(np.full_like(expected, np.nan))
    result = subquad.yoso_attention(strided(q), strided(k)[..., ::1], strided(v), **METHOD[method], out=out)
    assert result is out
    np.testing.assert_array_equal(out, expected)
    flipped = subquad.yoso_attention(q[:, :, ::-1], k, v, **METHOD[method])
    np.testing.assert_array_equal(flipped[:, :, ::-1], expected)
    for actual, truth in zip(
        subquad.yoso_attention_bwd(strided(expected), strided(q), strided(k), strided(v), **METHOD[method]),
        subquad.yoso_attention_bwd(expected, q, k, v, **METHOD[method]),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, truth)


@pytest.mark.backends
@pytest.mark.parametrize("method", ["hadamard", "expectation"])
def test_broadcast_inputs(method, isa):
    q, k, v, _ = arrays(BY_NAME["plain"])
    shared = np.broadcast_to(k[:1, :1], k.shape)
    expected = subquad.yoso_attention(q, np.ascontiguousarray(shared), v, **METHOD[method])
    np.testing.assert_array_equal(subquad.yoso_attention(q, shared, v, **METHOD[method]), expected)


def test_huge_strides_on_little_memory():
    """Offsets beyond 2^31 elements: a view of few pages of a large sparse mapping."""
    base = np.zeros(3 << 30, np.uint8).view(np.float32)  # 3 GiB of address space, touched in a few places only
    view = np.lib.stride_tricks.as_strided(base, (1, 2, 8, 16), (0, (3 << 29), 4096, 4))
    values = np.random.default_rng(0).standard_normal(view.shape).astype(np.float32)
    view[...] = values
    expected = subquad.yoso_attention(values, values, values, **METHOD["hadamard"])
    np.testing.assert_array_equal(subquad.yoso_attention(view, view, view, **METHOD["hadamard"]), expected)


@pytest.mark.backends
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e15, 1e30])
@pytest.mark.parametrize("method", ["hadamard", "expectation"])
def test_norms_of_queries_and_keys_do_not_matter(method, scale, isa):
    q, k, v, _ = arrays(BY_NAME["tails"])
    out = subquad.yoso_attention(q * np.float32(scale), k, v, **METHOD[method])
    expected = subquad.yoso_attention(q, k, v, **METHOD[method])
    np.testing.assert_allclose(out, expected, atol=2e-2 if scale == 1e-38 else 2e-5)
    for gradient in subquad.yoso_attention_bwd(
        v[:, :, :1].repeat(37, 2), q, k * np.float32(scale), v, **METHOD[method]
    ):
        assert not np.isnan(gradient).any()


@pytest.mark.backends
@pytest.mark.parametrize("method", [m for m in METHOD])
def test_parallel_opposite_equal_and_zero_rows_stay_finite(method, isa):
    _, k, v, _ = arrays(BY_NAME["plain"])
    k[:, :, 3] = k[:, :, 2]
    k[:, :, 4] = 0
    for q in (k, -k, 2 * k, np.zeros_like(k)):
        out = subquad.yoso_attention(q, k, v, **METHOD[method])
        assert np.isfinite(out).all()
        grads = ["exact", "lower_bound"] + ([] if method == "expectation" else ["sampled", "sampled_exact"])
        for grad in grads:
            gradients = subquad.yoso_attention_bwd(v, q, k, v, **METHOD[method], grad=grad)
            assert all(np.isfinite(g).all() for g in gradients)
            assert (gradients[1][:, :, 4] == 0).all(), "a zero key has no direction, so no gradient"


@pytest.mark.backends
def test_rows_without_collisions_are_zero_and_pass_no_gradient(isa):
    q = np.zeros((1, 1, 3, 16), np.float32)
    q[..., 0] = 1
    k, v = -q, np.ones_like(q)
    for bits, hashes in ((8, 4), (20, 2)):
        keywords = dict(num_hashes=hashes, hash_bits=bits, seed=1, hashing="gaussian")
        out, lse = subquad.yoso_attention(q, k, v, **keywords, return_lse=True)
        assert (out == 0).all() and (lse == -np.inf).all()
        for grad in ("sampled", "sampled_exact", "lower_bound", "exact"):
            for gradient in subquad.yoso_attention_bwd(v, q, k, v, **keywords, grad=grad):
                assert (gradient == 0).all()


# Laws


@pytest.mark.backends
@pytest.mark.parametrize("method", METHOD)
def test_same_bits_again_alone_and_in_a_batch(method, isa):
    case = BY_NAME["causal_masked_grouped"]
    q, k, v, masks = arrays(case)
    out = subquad.yoso_attention(q, k, v, **METHOD[method], **masks)
    np.testing.assert_array_equal(out, subquad.yoso_attention(q, k, v, **METHOD[method], **masks))
    alone = {name: m[1:] if isinstance(m, np.ndarray) else m for name, m in masks.items()}
    np.testing.assert_array_equal(out[1:], subquad.yoso_attention(q[1:], k[1:], v[1:], **METHOD[method], **alone))


@pytest.mark.backends
@pytest.mark.parametrize("method", METHOD)
def test_a_later_token_leaves_earlier_rows_bit_identical(method, isa):
    q, k, v, _ = arrays(BY_NAME["causal"])
    out = subquad.yoso_attention(q, k, v, **METHOD[method], is_causal=True)
    for x in (q, k, v):
        x[:, :, 25:] = np.nan
    changed = subquad.yoso_attention(q, k, v, **METHOD[method], is_causal=True)
    np.testing.assert_array_equal(out[:, :, :25], changed[:, :, :25])


@pytest.mark.backends
@pytest.mark.parametrize("method", METHOD)
def test_decoding_is_the_last_rows_of_prefill(method, isa):
    q, k, v, _ = arrays(BY_NAME["causal"])
    out = subquad.yoso_attention(q, k, v, **METHOD[method], is_causal=True)
    last = subquad.yoso_attention(q[:, :, -3:], k, v, **METHOD[method], is_causal=True)
    np.testing.assert_allclose(last, out[:, :, -3:], atol=1e-6)


@pytest.mark.backends
def test_masked_is_absent(isa):
    case = BY_NAME["masked"]
    q, k, v, masks = arrays(case)
    keep_k, keep_q = masks["key_mask"][0], masks["query_mask"][0]
    for keywords in METHOD.values():
        out = subquad.yoso_attention(q[:1], k[:1], v[:1], **keywords, key_mask=keep_k[None], query_mask=keep_q[None])
        short = subquad.yoso_attention(q[:1, :, keep_q], k[:1, :, keep_k], v[:1, :, keep_k], **keywords)
        np.testing.assert_allclose(out[:, :, keep_q], short, atol=2e-6)
        assert (out[:, :, ~keep_q] == 0).all()


@pytest.mark.backends
def test_grouped_heads_equal_repeated_heads_for_shared_planes(isa):
    q, k, v, _ = arrays(BY_NAME["grouped"])
    planes = subquad.random_normal((5, 4, 16), seed=1)
    grouped = subquad.yoso_attention(q, k, v, planes=planes)
    repeated = subquad.yoso_attention(q, k.repeat(3, 1), v.repeat(3, 1), planes=planes)
    np.testing.assert_array_equal(grouped, repeated)


@pytest.mark.backends
def test_explicit_randomness_equals_the_seed(isa):
    q, k, v, _ = arrays(BY_NAME["grouped"])
    planes = subquad.random_normal((2, 6 * 5, 16), seed=9, stream=1).reshape(2, 6, 5, 16)
    seeded = subquad.yoso_attention(q, k, v, num_hashes=6, hash_bits=5, hashing="gaussian", seed=9)
    np.testing.assert_array_equal(seeded, subquad.yoso_attention(q, k, v, planes=planes))
    parts = subquad._ext.hadamard_parts(6, 5, 16, "strided")
    signs = subquad.random_signs((2, 3 * parts, 64), seed=9, stream=2).reshape(2, 3, parts, 64)
    seeded = subquad.yoso_attention(q, k, v, num_hashes=6, hash_bits=5, seed=9)
    np.testing.assert_array_equal(seeded, subquad.yoso_attention(q, k, v, num_hashes=6, hash_bits=5, signs=signs))


@pytest.mark.backends
def test_seeds(isa):
    q, k, v, _ = arrays(BY_NAME["plain"])
    run = lambda seed: subquad.yoso_attention(q, k, v, num_hashes=2, hash_bits=6, seed=seed)  # noqa: E731
    np.testing.assert_array_equal(run(5), run(np.array(5, np.int64)))
    np.testing.assert_array_equal(run(-1), run(2**64 - 1))
    assert not np.array_equal(run(5), run(6))
    assert not np.array_equal(run(5), run(5 + 2**32))


@pytest.mark.backends
def test_lse_is_the_log_of_the_norm(isa):
    q, k, v, masks = arrays(BY_NAME["masked_grouped"])
    for keywords in (METHOD["hadamard"], METHOD["expectation"]):
        out, lse = subquad.yoso_attention(q, k, v, **keywords, **masks, return_lse=True)
        raw = subquad.yoso_attention(q, k, v, **keywords, **masks, normalize=False)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(lse, np.log(np.linalg.norm(raw, axis=-1)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out * np.exp(lse)[..., None], raw, atol=1e-5 * np.abs(raw).max())


# Statistics: fixed seeds, stated confidence


@pytest.mark.statistical
@pytest.mark.parametrize("hashing", ["gaussian", "hadamard"])
def test_the_sampled_sum_is_unbiased(hashing):
    """z test over 144 outputs and 600 draws: |z| <= 4.5 has a false alarm rate below 1e-3 over all of them."""
    case = Case("stats", batch=1, heads=1, heads_kv=1, seq_q=12, seq_k=16, dim=64, dim_v=12)
    q, k, v, _ = arrays(case)
    draws, hashes, bits = 600, 16, 6
    common = dict(hash_bits=bits, normalize=False)
    mean = np.mean(
        [
            subquad.yoso_attention(q, k, v, num_hashes=hashes, hashing=hashing, seed=s, **common).astype(np.float64)
            for s in range(draws)
        ],
        axis=0,
    )
    exact = ref.yoso_attention(q, k, v, expectation=True, **common)
    variance = ref.sampled_variance(q, k, v, bits, hashes)
    z = (mean - exact) / np.sqrt(variance / draws)
    # strided carving leaves a collision bias of a few per cent for far pairs; the Gaussian law has none
    assert np.abs(z).max() <= (4.5 if hashing == "gaussian" else 9.0)


@pytest.mark.statistical
def test_the_error_falls_as_the_root_of_the_hashes():
    case = Case("slope", batch=1, heads=1, heads_kv=1, seq_q=64, seq_k=64, dim=32, dim_v=16)
    q, k, v, _ = arrays(case)
    exact = ref.yoso_attention(q, k, v, expectation=True, hash_bits=6, normalize=False)
    counts = [8, 32, 128]
    errors = [
        np.sqrt(
            np.mean(
                [
                    (
                        subquad.yoso_attention(
                            q, k, v, num_hashes=m, hash_bits=6, hashing="gaussian", seed=s, normalize=False
                        )
                        - exact
                    )
                    ** 2
                    for s in range(20)
                ]
            )
        )
        for m in counts
    ]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.56 < slope < -0.44


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.backends
def test_weights_below_the_range_of_halves_are_not_lost(dtype, isa):
    """Of keys nearly opposite to the query only, what is left of the sum still has its direction."""
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed") if dtype == "bfloat16" else None
    angle = np.deg2rad(np.array([150.0, 155.0, 160.0]))
    q = as_dtype(np.array([1.0, 0.0]).reshape(1, 1, 1, 2), dtype)
    k = as_dtype(np.stack([np.cos(angle), np.sin(angle)], -1).reshape(1, 1, 3, 2), dtype)
    v = as_dtype(np.random.default_rng(0).standard_normal((1, 1, 3, 8)), dtype)
    out = subquad.yoso_attention(q, k, v, hash_bits=20, expectation=True)
    exact = ref.yoso_attention(*(x.astype(np.float64) for x in (q, k, v)), hash_bits=20, expectation=True)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=4 * EPS[dtype])
