"""What jax does to the functions of subquad.jax: vmap, second derivatives, control flow, its buffers."""

import itertools

import numpy as np
import pytest

import subquad
from test_jax import equal, loss_of, small, to_jax

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

import subquad.jax as sj  # noqa: E402
from subquad.jax import _ffi  # noqa: E402

# Vmap


def stacked(count=3):
    rng = np.random.default_rng(5)
    q, k, v = ([x + i for i in range(count)] for x in small(1))
    masks = to_jax([rng.random((2, 20)) < 0.7 for _ in range(count)])
    planes = to_jax([subquad.random_normal((4, 3, 16), seed=i) for i in range(count)])
    return dict(q=q, k=k, v=v, key_mask=masks, seed=list(jnp.arange(count)), planes=planes)


def mapped_and_looped(function, mapped, axis=0, count=3):
    """vmap of function(**arrays) over some of its arguments, and the same by a loop in Python."""
    lists = stacked(count)
    args = {n: jnp.stack(x, axis) if n in mapped else x[0] for n, x in lists.items()}
    in_axes = ({n: axis if n in mapped else None for n in lists},)
    each = [function({n: x[i if n in mapped else 0] for n, x in lists.items()}) for i in range(count)]
    return jax.vmap(function, in_axes), args, jax.tree.map(lambda *xs: jnp.stack(xs), *each)


BATCHED = [c for n in range(1, 5) for c in itertools.combinations(("q", "k", "v", "key_mask"), n)]


@pytest.mark.parametrize(
    "mapped", [*BATCHED, ("seed",), ("seed", "q"), ("planes",), ("planes", "k", "key_mask")], ids=str
)
def test_vmap_is_a_loop(mapped):
    def function(given):
        drawn = "seed" if "seed" in mapped else "planes"
        given = {n: x for n, x in given.items() if n in ("q", "k", "v", "key_mask", drawn)}
        return sj.yoso_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given, return_lse=True)

    for axis in (0, -1):
        transformed, args, expected = mapped_and_looped(function, mapped, 0 if axis and "seed" in mapped else axis)
        assert equal(transformed(args), expected) and equal(jax.jit(transformed)(args), expected)


@pytest.mark.parametrize("mapped", [("q",), ("k", "v"), ("q", "k", "v", "key_mask"), ("q", "seed"), ("seed",)], ids=str)
def test_vmap_and_grad_in_either_order(mapped):
    def loss(given):
        keywords = {n: given[n] for n in ("key_mask", "seed")}
        return loss_of(sj.yoso_attention)(given["q"], given["k"], given["v"], num_hashes=4, hash_bits=3, **keywords)

    def gradient(given):
        return jax.grad(lambda qkv: loss(given | qkv))({n: given[n] for n in ("q", "k", "v")})

    transformed, args, expected = mapped_and_looped(gradient, mapped)
    assert equal(transformed(args), expected) and equal(jax.jit(transformed)(args), expected)
    many, args, _ = mapped_and_looped(loss, mapped)
    summed = jax.grad(lambda qkv: many(args | qkv).sum())({n: args[n] for n in ("q", "k", "v")})
    for name, x in summed.items():
        if name in mapped:
            assert equal(x, expected[name])
        else:
            np.testing.assert_allclose(x, expected[name].sum(0), rtol=1e-5, atol=1e-5)


def test_nested_vmap():
    q, k, v = small()
    many, seeds = jnp.stack([q, q + 1, q - 1]), jnp.arange(2)
    function = lambda q, k, seed: sj.yoso_attention(q, k, v, num_hashes=4, seed=seed)  # noqa: E731
    over_both = jax.vmap(jax.vmap(function, (0, None, None)), (None, None, 0))(many, k, seeds)
    assert equal(over_both, jnp.stack([jnp.stack([function(x, k, s) for x in many]) for s in seeds]))
    folded = jax.vmap(jax.vmap(lambda q, k: function(q, k, 1), (0, None)), (None, 0))(many, jnp.stack([k, -k]))
    assert equal(folded, jnp.stack([jnp.stack([function(x, y, 1) for x in many]) for y in (k, -k)]))
    assert jax.vmap(function, (0, None, None))(many[:0], k, 1).shape == (0, *q.shape)
    assert jax.vmap(function, (None, None, 0))(q, k, seeds[:0]).shape == (0, *q.shape)


# Buffers and control flow


def test_operands_are_the_buffers_of_xla(monkeypatch):
    seen = {}

    def spy(plain=_ffi.FUNCTIONS["yoso_attention"], **arguments):
        seen.update({n: arguments[n] for n in ("q", "k", "out")})
        return plain(**arguments)

    q, k, v = small()
    compiled = jax.jit(lambda q, k: sj.yoso_attention(q, k, v)).lower(q, k).compile()
    monkeypatch.setitem(_ffi.FUNCTIONS, "yoso_attention", spy)
    out = jax.block_until_ready(compiled(q, k))
    for name, x in (("q", q), ("k", k), ("out", out)):
        assert seen[name].ctypes.data == x.unsafe_buffer_pointer(), name
    assert not seen["q"].flags.writeable


def test_inputs_are_unharmed():
    q, _, v = small()
    before, expected = np.array(q), sj.yoso_attention(q, q, q)
    assert equal(jax.jit(lambda q: sj.yoso_attention(q, q, q))(q), expected) and equal(q, before)
    assert equal(jax.jit(lambda q, k: sj.yoso_attention(q, k, q))(q, q), expected) and equal(q, before)
    expected = sj.yoso_attention(q, v, v)
    assert equal(jax.jit(lambda q: sj.yoso_attention(q, v, v), donate_argnums=0)(jnp.array(q, copy=True)), expected)


def test_control_flow_rematerialization_and_constants():
    q, k, v = small()
    function = lambda q, seed=3: sj.yoso_attention(q, k, v, num_hashes=4, seed=seed)  # noqa: E731
    carried, expected = jax.lax.scan(lambda q, seed: (function(q, seed), None), q, jnp.arange(3))[0], q
    for seed in range(3):
        expected = function(expected, seed)
    assert equal(carried, expected)
    twice = loss_of(lambda q: function(function(q)))
    assert equal(jax.jit(jax.grad(jax.checkpoint(twice)))(q), jax.jit(jax.grad(twice))(q))
    assert equal(jax.jit(lambda: function(q))(), function(q))
    assert equal(jax.jit(lambda: jax.grad(loss_of(function))(q))(), jax.grad(loss_of(function))(q))
    assert equal(jax.grad(loss_of(function))(np.asarray(q)), jax.grad(loss_of(function))(q))
    assert jax.eval_shape(function, q).shape == q.shape


def test_empty_extents():
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8)):
        x = jnp.ones(shape)
        assert jax.jit(sj.yoso_attention)(x, x, x).shape == shape
        assert jax.jit(jax.grad(lambda x: sj.yoso_attention(x, x, x).sum()))(x).shape == shape
    q, k = jnp.ones((1, 2, 3, 8)), jnp.ones((1, 2, 0, 8))
    assert (jax.jit(sj.yoso_attention)(q, k, k) == 0).all()


# What is refused


def test_forward_mode_and_second_derivatives_raise():
    q, k, v = small()
    function = lambda q: sj.yoso_attention(q, k, v).sum()  # noqa: E731
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(function, (q,), (q,))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda q: jax.grad(function)(q).sum())(q)


def test_an_error_inside_a_computation_is_jaxs(monkeypatch):
    def fail(**arguments):
        raise RuntimeError("[yoso_attention] a sentence of its own")

    q, k, v = small()
    compiled = jax.jit(lambda q: sj.yoso_attention(q, k, v)).lower(q).compile()
    monkeypatch.setitem(_ffi.FUNCTIONS, "yoso_attention", fail)
    with pytest.raises(RuntimeError, match=r"\[yoso_attention\] a sentence of its own"):
        jax.block_until_ready(compiled(q))
