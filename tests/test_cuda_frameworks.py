"""CUDA arrays of cupy through the plain functions, and of jax through subquad.jax."""

import itertools

import numpy as np
import pytest

import subquad
from cases import DTYPES, arrays
from cuda_frameworks import cupy_on_cuda, jax_device, jax_on_cuda, needs_cuda
from yoso_checks import BY_NAME, METHOD, check_backward, check_forward

pytestmark = needs_cuda

SAMPLED = METHOD["hadamard"]
METHODS = [("hadamard", "sampled"), ("hadamard", "exact"), ("expectation", "exact")]
NAMES = ("tails", "masked_grouped", "causal_masked_grouped")


def random_arrays(*shapes):
    return [np.random.default_rng(i).standard_normal(shape, np.float32) for i, shape in enumerate(shapes)]


# Cupy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "grad"), METHODS)
def test_cupy_values(method, grad, dtype):
    for name in NAMES:
        check_forward(BY_NAME[name], METHOD[method], dtype, cupy_on_cuda())
        check_backward(BY_NAME[name], METHOD[method] | dict(grad=grad), dtype, framework=cupy_on_cuda())


def test_cupy_arrays_are_views_and_outputs():
    framework = cupy_on_cuda()
    q, k, v = random_arrays(*[(2, 4, 37, 32)] * 3)
    made = framework.arrays(q, k, v)
    expected = framework.read(subquad.yoso_attention(*made, **SAMPLED))
    views = [x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) for x in made]
    assert not any(x.flags.c_contiguous for x in views)
    out = views[0] * 0
    assert subquad.yoso_attention(*views, **SAMPLED, out=out) is out
    np.testing.assert_array_equal(framework.read(out), expected)
    seeded = subquad.yoso_attention(*made, **SAMPLED | dict(seed=framework.make(np.array(3))))
    np.testing.assert_array_equal(framework.read(seeded), expected)
    flipped = subquad.yoso_attention(made[0][:, :, ::-1], *made[1:], **SAMPLED)
    np.testing.assert_array_equal(framework.read(flipped)[:, :, ::-1], expected)
    assert out.device == made[0].device


def test_cupy_current_stream():
    """The inputs are written behind a long product on a stream of their own, which no other stream waits for."""
    framework = cupy_on_cuda()
    import cupy

    given = framework.arrays(*random_arrays(*[(2, 4, 37, 32)] * 3))
    expected = subquad.yoso_attention(*given, **SAMPLED)
    late, big = [x * 0 for x in given], cupy.ones((6144, 6144), np.float32)
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        big @ big
        subquad.yoso_attention(*late, **SAMPLED)
    cupy.cuda.Device().synchronize()
    with side:
        for _ in range(20):
            big @ big
        for x, value in zip(late, given, strict=True):
            x[...] = value
        out = subquad.yoso_attention(*late, **SAMPLED)
        assert subquad._ext._resources(out, 1000)[1] == side.ptr
    side.synchronize()
    np.testing.assert_array_equal(framework.read(out), framework.read(expected))


def test_cupy_and_torch_do_not_mix():
    framework = cupy_on_cuda()
    import torch

    (x,) = framework.arrays(*random_arrays((1, 2, 5, 8)))
    with pytest.raises(TypeError, match=r"^\[yoso_attention\] k: expected an array of the same framework as q"):
        subquad.yoso_attention(x, torch.ones(1, 2, 5, 8, device="cuda"), x)


# Jax


@pytest.fixture
def sj():
    jax_device()
    import subquad.jax

    return subquad.jax


def vjp_of(function):
    """The gradients for q, k and v, as the plain backward function takes its arguments."""
    import jax

    def gradients(dout, q, k, v, **keywords):
        return jax.vjp(lambda q, k, v: function(q, k, v, **keywords), q, k, v)[1](dout)

    return gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "grad"), METHODS)
@pytest.mark.parametrize("jitted", [False, True])
def test_jax_values(jitted, method, grad, dtype, sj):
    import jax

    arguments = ("is_causal", *METHOD[method], "grad")

    def wrap(function):
        return jax.jit(function, static_argnames=arguments) if jitted else function

    for name in NAMES:
        framework = jax_on_cuda()
        check_forward(BY_NAME[name], METHOD[method], dtype, framework, wrap(sj.yoso_attention))
        options = METHOD[method] | dict(grad=grad)
        backward = wrap(vjp_of(sj.yoso_attention))
        check_backward(BY_NAME[name], options, dtype, framework=framework, function=backward)


@pytest.mark.parametrize("options", [SAMPLED, dict(hash_bits=5, expectation=True)], ids=str)
def test_jax_results_are_on_the_device_and_those_of_torch(options, sj):
    import jax
    import torch

    given = random_arrays(*[(2, 4, 37, 32)] * 3)
    q, k, v = jax_on_cuda().arrays(*given)
    out = jax.jit(lambda q, k, v: sj.yoso_attention(q, k, v, **options))(q, k, v)
    assert out.devices() == {jax_device()}
    expected = subquad.yoso_attention(*(torch.from_numpy(x).cuda() for x in given), **options)
    np.testing.assert_array_equal(np.asarray(out), expected.cpu().numpy())
    np.testing.assert_array_equal(np.asarray(sj.yoso_attention(q, k, v, **options)), np.asarray(out))


def test_jax_scratch_memory_is_ordered_after_its_kernels(sj):
    """Calls in a row give their scratch memory back while kernels still run; the next call may get the same memory."""
    import jax

    q, k, v = jax_on_cuda().arrays(*random_arrays(*[(1, 4, 3000, 64)] * 3))

    @jax.jit
    def many(q):
        for seed in range(8):
            q = sj.yoso_attention(q, k, v, num_hashes=8, hash_bits=8, seed=seed) + q
        return q

    one_by_one = q
    for seed in range(8):
        one_by_one = jax.block_until_ready(
            sj.yoso_attention(one_by_one, k, v, num_hashes=8, hash_bits=8, seed=seed) + one_by_one
        )
    np.testing.assert_array_equal(np.asarray(many(q)), np.asarray(one_by_one))


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_jax_seeds_on_the_device(dtype, sj):
    import jax

    framework = jax_on_cuda()
    q, k, v = framework.arrays(*random_arrays(*[(1, 2, 37, 16)] * 3))
    function = jax.jit(lambda q, seed: sj.yoso_attention(q, k, v, num_hashes=4, seed=seed))
    for seed in (0, 5, 200) + ((-7,) if dtype == "int32" else ()):
        given = framework.make(np.array(seed, dtype))
        expected = np.asarray(sj.yoso_attention(q, k, v, num_hashes=4, seed=seed))
        np.testing.assert_array_equal(np.asarray(function(q, given)), expected)
        np.testing.assert_array_equal(np.asarray(sj.yoso_attention(q, k, v, num_hashes=4, seed=given)), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mapped", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)], ids=str)
def test_jax_vmap_is_a_loop(mapped, batch, sj):
    import jax

    stacked = jax_on_cuda().arrays(*random_arrays(*[(3, batch, 2, 20, 16)] * 3))
    given = [x if i in mapped else x[0] for i, x in enumerate(stacked)]
    function = lambda q, k, v: sj.yoso_attention(q, k, v, num_hashes=4)  # noqa: E731
    got = jax.jit(jax.vmap(function, tuple(0 if i in mapped else None for i in range(3))))(*given)
    for item in range(3):
        expected = function(*(x[item] if i in mapped else x for i, x in enumerate(given)))
        np.testing.assert_array_equal(np.asarray(got[item]), np.asarray(expected))


def test_jax_errors(sj):
    import jax

    q, k, v = jax_on_cuda().arrays(*random_arrays(*[(1, 2, 5, 16)] * 3))
    words = r"^\[yoso_attention\] q: expected a jax array on the cpu, got one on .*: use subquad\.jax"
    with pytest.raises(TypeError, match=words):
        subquad.yoso_attention(q, k, v)
    with pytest.raises(ValueError, match=r"\[yoso_attention\] hash_bits: expected "):
        jax.jit(lambda q: sj.yoso_attention(q, k, v, hash_bits=0))(q)
    (wide,) = jax_on_cuda().arrays(*random_arrays((1, 1, 5, 257)))
    for call in (jax.jit(sj.yoso_attention), sj.yoso_attention):
        with pytest.raises(Exception, match=r"no kernel on cuda:\d+ for a head dim"):
            jax.block_until_ready(call(wide, wide, wide))
    with pytest.raises(Exception, match=r"no kernel on cuda:\d+"):
        jax.block_until_ready(jax.jit(sj.softmax_attention)(q, k, v))
    with pytest.raises(ValueError, match="(?i)devices"):
        sj.yoso_attention(q, jax.device_put(k, jax.devices("cpu")[0]), v)


def test_jax_arrays_on_the_cpu_stay_there(sj):
    import jax

    q, k, v, _ = arrays(BY_NAME["grouped"])
    given = [jax.device_put(x, jax.devices("cpu")[0]) for x in (q, k, v)]
    out = jax.jit(lambda *qkv: sj.yoso_attention(*qkv, **SAMPLED))(*given)
    assert {d.platform for d in out.devices()} == {"cpu"}
    np.testing.assert_array_equal(np.asarray(out), subquad.yoso_attention(q, k, v, **SAMPLED))
