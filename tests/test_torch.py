"""subquad.torch: the plain functions with autograd, and everything torch does to an operator."""

import inspect

import numpy as np
import pytest

import subquad
from cases import CASES, DTYPES, arrays
from ref import collision_attention as ref_collision
from ref import yoso_attention as ref
from tolerance import assert_budget, round_to

torch = pytest.importorskip("torch", reason="torch is not installed")

import subquad.torch as st  # noqa: E402

BY_NAME = {case.name: case for case in CASES}
SAMPLED = dict(num_hashes=5, hash_bits=4, seed=3)
OPTIONS = {
    "sampled": SAMPLED | dict(grad="sampled"),
    "sampled_exact": SAMPLED | dict(grad="sampled_exact"),
    "lower_bound": SAMPLED | dict(grad="lower_bound"),
    "exact": SAMPLED | dict(grad="exact"),
    "raw": SAMPLED | dict(normalize=False),
    "expectation": dict(hash_bits=5, expectation=True),
    "expectation_lower_bound": dict(hash_bits=5, expectation=True, grad="lower_bound"),
}


def tensors(case, dtype="float32", requires_grad=True):
    """q, k, v as leaves and the mask keywords, as torch has them."""
    *qkv, keywords = arrays(case)
    leaves = [torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_(requires_grad) for x in qkv]
    return *leaves, {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}


def plain(q, k, v, **keywords):
    with torch.no_grad():
        return subquad.yoso_attention(q, k, v, **keywords)


def wide(x):
    return x.detach().to(torch.float64).numpy()


def equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


# Matches the plain function and the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["sampled", "raw", "expectation"])
def test_forward_is_the_plain_function_bit_for_bit(options, dtype):
    for case in CASES:
        q, k, v, masks = tensors(case, dtype)
        expected = plain(q, k, v, **OPTIONS[options], **masks)
        out = st.yoso_attention(q, k, v, **OPTIONS[options], **masks)
        assert out.requires_grad and out.dtype == q.dtype and torch.equal(out, expected)
        with torch.no_grad():
            assert torch.equal(st.yoso_attention(q, k, v, **OPTIONS[options], **masks), expected)


def check_gradients(case, options, dtype):
    q, k, v, masks = tensors(case, dtype)
    out = st.yoso_attention(q, k, v, **options, **masks)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    out.backward(torch.from_numpy(dout).to(out.dtype))
    given = [round_to(dout, dtype), *(wide(x) for x in (q, k, v))]
    masks = {name: m.numpy() if isinstance(m, torch.Tensor) else m for name, m in masks.items()}
    exact = ref.yoso_attention_bwd(*given, **options, **masks)
    single = ref.yoso_attention_bwd(*given, **options, **masks, dtype=np.float32)
    for name, x, truth, rounded in zip(("dq", "dk", "dv"), (q, k, v), exact, single, strict=True):
        assert x.grad.dtype == x.dtype
        floor = np.abs(truth).max(initial=0) * 4e-6
        assert_budget(wide(x.grad), truth, round_to(rounded, dtype), dtype=dtype, floor=floor, what=f"{name} of {case}")


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_match_the_reference(options):
    for case in CASES:
        check_gradients(case, OPTIONS[options], "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_in_16_bits(options, dtype):
    for name in ("tails", "masked_grouped", "causal_masked_grouped"):
        check_gradients(BY_NAME[name], OPTIONS[options], dtype)


@pytest.mark.parametrize("options", OPTIONS)
def test_masked_tokens_hold_nan_and_get_no_gradient(options):
    q, k, v, masks = tensors(BY_NAME["causal_masked_grouped"])
    out = st.yoso_attention(q, k, v, **OPTIONS[options], **masks)
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    for x, mask in ((q, masks["query_mask"]), (k, masks["key_mask"]), (v, masks["key_mask"])):
        assert torch.isnan(x).any() or torch.isinf(x).any()
        assert torch.isfinite(x.grad).all()
        assert (x.grad.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("grad", ["exact", "lower_bound"])
def test_collision_attention(grad):
    q, k, v, masks = tensors(BY_NAME["causal_masked_grouped"])
    out = st.collision_attention(q, k, v, 5, grad=grad, **masks)
    with torch.no_grad():
        assert torch.equal(out, subquad.collision_attention(q, k, v, 5, **masks))
    out.sum().backward()
    masks = {name: m.numpy() if isinstance(m, torch.Tensor) else m for name, m in masks.items()}
    given = [np.ones(out.shape), *(wide(x) for x in (q, k, v))]
    exact = ref_collision.collision_attention_bwd(*given, 5, grad=grad, **masks)
    single = ref_collision.collision_attention_bwd(*given, 5, grad=grad, **masks, dtype=np.float32)
    for x, truth, rounded in zip((q, k, v), exact, single, strict=True):
        assert_budget(x.grad.numpy(), truth, rounded, floor=np.abs(truth).max() * 4e-6)


def test_the_functions_take_the_keywords_of_the_plain_ones():
    for name in ("yoso_attention", "collision_attention"):
        here, there = (inspect.signature(getattr(module, name)).parameters for module in (st, subquad))
        assert list(here) == list(there) or set(here) == {*there, "grad"}
        for key in there:
            assert (here[key].default, here[key].kind) == (there[key].default, there[key].kind), key


# Arguments and results of autograd


def test_lse_is_returned_and_takes_no_part():
    q, k, v, _ = tensors(BY_NAME["plain"])
    out, lse = st.yoso_attention(q, k, v, **SAMPLED, return_lse=True)
    assert equal((out, lse), plain(q, k, v, **SAMPLED, return_lse=True))
    assert lse.dtype == torch.float32 and not lse.requires_grad
    with pytest.raises(ValueError, match=r"\[yoso_attention\] lse: expected normalize=True"):
        st.yoso_attention(q, k, v, normalize=False, return_lse=True)


def test_seeds_and_explicit_draws():
    q, k, v, _ = tensors(BY_NAME["grouped"], requires_grad=False)
    for seed in (7, -1, 2**64 - 2, torch.tensor(7), np.int64(7)):
        assert torch.equal(st.yoso_attention(q, k, v, seed=seed), plain(q, k, v, seed=seed))
    planes = torch.from_numpy(subquad.random_normal((6, 5, 16), seed=9)).requires_grad_()
    q.requires_grad_()
    out = st.yoso_attention(q, k, v, planes=planes)
    out.sum().backward()
    assert planes.grad is None and q.grad is not None
    assert torch.equal(out, plain(q, k, v, planes=planes))


@pytest.mark.parametrize("options", ["sampled", "raw", "expectation"])
def test_gradients_of_any_layout(options):
    """Expanded, transposed and strided gradients of the result; inputs of which only one is differentiated."""
    q, k, v, _ = tensors(BY_NAME["plain"])

    def gradients(dout, inputs=(q, k, v)):
        return torch.autograd.grad(st.yoso_attention(q, k, v, **OPTIONS[options]), inputs, dout)

    dout = torch.randn(2, 2, 20, 16)
    expected = gradients(dout)
    for layout in (dout.transpose(1, 2).contiguous().transpose(1, 2), dout.mT.contiguous().mT):
        assert equal(gradients(layout), expected)
    assert equal(gradients(torch.ones(()).expand(2, 2, 20, 16)), gradients(torch.ones(2, 2, 20, 16)))
    for x, gradient in zip((q, k, v), expected, strict=True):
        assert equal(gradients(dout, (x,)), (gradient,))


def test_a_backward_pass_notices_overwritten_inputs():
    q, k, v, _ = tensors(BY_NAME["plain"])
    seed = torch.tensor(4)
    out = st.yoso_attention(q, k, v, num_hashes=2, seed=seed)
    seed.fill_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_refusals():
    q, k, v, _ = tensors(BY_NAME["plain"])
    with pytest.raises(RuntimeError, match=r"subquad\.torch"):
        subquad.yoso_attention(q, k, v)
    first = torch.autograd.grad(st.yoso_attention(q, k, v, **SAMPLED).sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"\[yoso_attention\] backward: expected to be differentiated once"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: st.yoso_attention(q, k, v), (q,), (q,))
    for error, sentence, changes in (
        (TypeError, "out: expected None.*use subquad.yoso_attention", dict(out=torch.empty_like(v))),
        (TypeError, "num_hashes: expected an integer, got float", dict(num_hashes=2.0)),
        (TypeError, "num_hashes: expected an integer, got bool", dict(num_hashes=True)),
        (TypeError, "seed: expected an integer, got str", dict(seed="7")),
        (TypeError, "is_causal: expected True or False, got int", dict(is_causal=1)),
        (TypeError, "hashing: expected a string, got int", dict(hashing=1)),
        (TypeError, "key_mask: expected a torch tensor .*, got ndarray", dict(key_mask=np.ones((2, 20), bool))),
        (TypeError, "key_mask: expected dtype bool, got float32", dict(key_mask=torch.ones(2, 20))),
        (ValueError, "seed: expected an integer of 64 bits, got", dict(seed=2**64)),
        (ValueError, "hash_bits: expected a value in", dict(hash_bits=0)),
        (ValueError, 'hashing: expected "hadamard" or "gaussian", got "fast"', dict(hashing="fast")),
    ):
        with pytest.raises(error, match=rf"\[yoso_attention\] {sentence}"):
            st.yoso_attention(q, k, v, **changes)
    with pytest.raises(ValueError, match=r"\[yoso_attention\] k: expected shape \[B, Hkv, M, D\]"):
        st.yoso_attention(q, k[..., :3], v)
    with pytest.raises(TypeError, match=r"\[yoso_attention\] .*float64"):
        st.yoso_attention(q.double(), k.double(), v.double())


# What torch does to an operator


@pytest.mark.parametrize("options", ["sampled", "raw", "expectation"])
@pytest.mark.parametrize("name", ["causal_masked_grouped", "tails"])
def test_opcheck(options, name):
    q, k, v, masks = tensors(BY_NAME[name])
    keywords = OPTIONS[options] | {key: x for key, x in masks.items() if x is not False}
    ops = torch.ops.subquad
    torch.library.opcheck(ops.yoso_attention.default, (q, k, v), keywords)
    torch.library.opcheck(ops.yoso_attention.default, (q, k, v), keywords | dict(seed_tensor=torch.tensor(2)))
    with torch.no_grad():
        out, lse = ops.yoso_attention(q, k, v, **keywords)
    detached = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(ops.yoso_attention_bwd.default, (out, *detached), keywords | dict(out=out, lse=lse))


def test_opcheck_collision_attention():
    q, k, v, masks = tensors(BY_NAME["causal_masked_grouped"])
    torch.library.opcheck(torch.ops.subquad.collision_attention.default, (q, k, v, 5), masks)


def loss_and_gradients(function, *inputs):
    loss = function(*inputs).float().square().sum()
    return loss.detach(), *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", ["sampled", "raw", "expectation"])
def test_compile_forward_and_backward(options, backend):
    torch._dynamo.reset()
    q, k, v, masks = tensors(BY_NAME["causal_masked_grouped"])

    def function(q, k, v):
        return st.yoso_attention(q * 2, k, v, **OPTIONS[options], **masks) + 1

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for x, y in zip(loss_and_gradients(compiled, q, k, v), loss_and_gradients(function, q, k, v), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_compile_with_dynamic_shapes_and_seeds():
    torch._dynamo.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(q, v, seed):
        return st.yoso_attention(q, q, v, num_hashes=4, seed=seed)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for n, seed in ((5, 1), (9, 2), (14, 2**40), (23, -4)):
        q, v = (torch.randn(2, 2, n, dim, requires_grad=True) for dim in (16, 7))
        for s in (seed, torch.tensor(seed)):
            runs = [loss_and_gradients(lambda q, v, f=f, s=s: f(q, v, s), q, v) for f in (compiled, function)]
            assert equal(*runs)
    assert len(frames) == 2, "one graph for integer seeds, one for tensors"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_casts_the_arrays_and_only_them(dtype):
    q, k, v, _ = tensors(BY_NAME["grouped"])
    low = getattr(torch, dtype)
    planes = torch.from_numpy(subquad.random_normal((6, 5, 16), seed=9))

    def function(q, k, v):
        return st.yoso_attention(q, k, v, planes=planes)

    with torch.autocast("cpu", low):
        out = function(q, k.detach().to(low), v)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    expected = function(q.to(low), k.to(low), v.to(low))
    assert out.dtype == low and torch.equal(out, expected) and torch.equal(compiled, expected)
    gradients = torch.autograd.grad(out.float().sum(), (q, v))
    assert equal(gradients, torch.autograd.grad(expected.float().sum(), (q, v)))


def test_vmap():
    q, k, v, masks = tensors(BY_NAME["masked_grouped"], requires_grad=False)
    many_q, many_k = torch.stack([q, q + 1, q - 1]), torch.stack([k, k * 2, -k], dim=-1)
    keep = torch.stack([masks["key_mask"]] * 3)
    keep[1] = True

    def function(q, k, keep, seed=3):
        return st.yoso_attention(q, k, v.nan_to_num(0, 0, 0), num_hashes=4, key_mask=keep, seed=seed)

    clean = many_k.nan_to_num()
    out = torch.vmap(function, in_dims=(0, -1, 0))(many_q, clean, keep)
    each = [function(many_q[i], clean[..., i].contiguous(), keep[i]) for i in range(3)]
    assert torch.equal(out, torch.stack(each))
    assert torch.vmap(function, in_dims=(0, None, None))(many_q[:0], clean[..., 0], keep[0]).shape == (0, *q.shape)
    seeds = torch.vmap(function, in_dims=(None, None, None, 0))(q, clean[..., 0].contiguous(), keep[1], torch.arange(3))
    assert torch.equal(seeds[2], function(q, clean[..., 0].contiguous(), keep[1], seed=2))


def test_functional_gradients():
    """torch.func: gradients for each of several inputs at once, in either order of grad and vmap."""
    q, k, v, _ = tensors(BY_NAME["plain"], requires_grad=False)
    many = torch.stack([q, q + 1])

    def loss(q):
        return st.yoso_attention(q, k, v, **SAMPLED).square().mul(torch.arange(16.0)).sum()

    each = []
    for x in many:
        leaf = x.clone().requires_grad_()
        each.append(torch.autograd.grad(loss(leaf), leaf)[0])
    assert equal(torch.vmap(torch.func.grad(loss))(many), each)
    assert equal(torch.func.grad(lambda many: torch.vmap(loss)(many).sum())(many), each)


def test_a_wrong_gradient_rule_is_an_error_in_the_forward_pass():
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    with pytest.raises(ValueError, match=r'\[collision_attention\] grad: expected "exact" or "lower_bound"'):
        subquad.torch.collision_attention(q, k, v, 4, grad="sampled")
