"""subquad.jax: the plain functions, bit for bit, under everything jax does to a function."""

import functools
import inspect
import subprocess
import sys

import numpy as np
import pytest

import subquad
from cases import CASES, DTYPES, arrays, as_dtype
from test_errors import METHOD_ERRORS, ok

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

import subquad.jax as sj  # noqa: E402
from subquad.jax import _ffi  # noqa: E402

BY_NAME = {case.name: case for case in CASES}
SAMPLED = dict(num_hashes=5, hash_bits=4, seed=3)
OPTIONS = {
    "sampled": SAMPLED | dict(grad="sampled"),
    "sampled_exact": SAMPLED | dict(grad="sampled_exact"),
    "lower_bound": SAMPLED | dict(grad="lower_bound"),
    "exact": SAMPLED | dict(grad="exact", carving="published"),
    "gaussian": SAMPLED | dict(hashing="gaussian"),
    "raw": SAMPLED | dict(normalize=False),
    "expectation": dict(hash_bits=5, expectation=True),
    "expectation_lower_bound": dict(hash_bits=5, expectation=True, grad="lower_bound"),
}


def is_array(x):
    return isinstance(x, np.ndarray)


def inputs(name, dtype="float32"):
    """q, k, v, the arrays among the keywords, and the others."""
    q, k, v, keywords = arrays(BY_NAME[name], dtype=dtype)
    return q, k, v, {n: x for n, x in keywords.items() if is_array(x)}, {"is_causal": keywords["is_causal"]}


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def equal(xs, ys):
    """Whether two trees of arrays have the same dtypes, shapes and bits (NaN of any kind alike)."""
    pairs = list(zip(jax.tree.leaves(xs), jax.tree.leaves(ys), strict=True))
    assert pairs
    return all(
        x.dtype == y.dtype and np.array_equal(*(np.asarray(a).astype(np.float32) for a in (x, y)), equal_nan=True)
        for x, y in pairs
    )


def loss_of(f):
    """A scalar whose gradient for f's result is not constant."""

    def loss(*args, **keywords):
        y = f(*args, **keywords).astype(jnp.float32)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    return loss


def small(seed=0):
    return to_jax([np.random.default_rng([seed, i]).standard_normal((2, 4, 20, 16), np.float32) for i in range(3)])


# The bits of the plain function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["sampled", "raw", "expectation"])
def test_forward(options, dtype):
    for case in CASES:
        *qkv, masks, keywords = inputs(case.name, dtype)
        expected = subquad.yoso_attention(*qkv, **masks, **keywords, **OPTIONS[options])
        function = functools.partial(sj.yoso_attention, **keywords, **OPTIONS[options])
        for transformed in (function, jax.jit(function)):
            out = transformed(*to_jax(qkv), **to_jax(masks))
            assert isinstance(out, jax.Array) and equal(out, expected), case


def check_gradients(case, dtype, options):
    *qkv, masks, keywords = inputs(case, dtype)
    out, *lse = outputs = subquad.yoso_attention(*qkv, **masks, **keywords, **options, return_lse=True)
    dout = as_dtype(np.random.default_rng(1).standard_normal(out.shape), dtype)
    expected = subquad.yoso_attention_bwd(dout, *qkv, **masks, **keywords, **options, out=out, lse=lse[0])

    def pull(q, k, v, dout, **masks):
        out, pull = jax.vjp(lambda q, k, v: sj.yoso_attention(q, k, v, **masks, **keywords, **options), q, k, v)
        return out, pull(dout)

    for transformed in (pull, jax.jit(pull)):
        out, gradients = transformed(*to_jax([*qkv, dout]), **to_jax(masks))
        assert equal(out, outputs[0]) and equal(gradients, expected)


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_gradients_of_every_case(case):
    check_gradients(case, "float32", SAMPLED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "raw"])
def test_gradients_of_every_option(options, dtype):
    check_gradients("causal_masked_grouped", dtype, OPTIONS[options])


def test_gradients_without_normalization():
    *qkv, masks, keywords = inputs("masked_grouped")
    options = OPTIONS["raw"] | keywords
    out = subquad.yoso_attention(*qkv, **masks, **options)
    expected = subquad.yoso_attention_bwd(np.ones_like(out), *qkv, **masks, **options)
    gradient = jax.grad(lambda qkv, masks: sj.yoso_attention(*qkv, **masks, **options).sum())
    for transformed in (gradient, jax.jit(gradient)):
        assert equal(transformed(to_jax(qkv), to_jax(masks)), expected)


@pytest.mark.parametrize("grad", ["exact", "lower_bound"])
def test_collision_attention(grad):
    *qkv, masks, keywords = inputs("causal_masked_grouped", "bfloat16")
    out = subquad.collision_attention(*qkv, 5, **masks, **keywords)
    expected = subquad.collision_attention_bwd(np.ones_like(out), *qkv, 5, grad=grad, **masks, **keywords)
    function = functools.partial(sj.collision_attention, hash_bits=5, grad=grad, **keywords)
    gradient = jax.grad(lambda qkv, masks: function(*qkv, **masks).sum())
    for wrap in (lambda f: f, jax.jit):
        assert equal(wrap(function)(*to_jax(qkv), **to_jax(masks)), out)
        assert equal(wrap(gradient)(to_jax(qkv), to_jax(masks)), expected)


def test_the_functions_take_the_keywords_of_the_plain_ones():
    for name in sj.__all__:
        here, there = (dict(inspect.signature(getattr(module, name)).parameters) for module in (sj, subquad))
        there.pop("out", None)
        assert set(here) - set(there) <= {"grad"} and set(there) <= set(here)
        for key in there:
            assert (here[key].default, here[key].kind) == (there[key].default, there[key].kind), key


# Arguments


def test_lse_is_returned_and_takes_no_part():
    q, k, v = small()
    expected = subquad.yoso_attention(*map(np.asarray, (q, k, v)), **SAMPLED, return_lse=True)
    function = functools.partial(sj.yoso_attention, **SAMPLED, return_lse=True)
    for transformed in (function, jax.jit(function)):
        assert equal(transformed(q, k, v), expected)
    assert (jax.grad(lambda q: function(q, k, v)[1].sum())(q) == 0).all()
    gradient = jax.jit(jax.grad(loss_of(lambda q: function(q, k, v)[0])))(q)
    assert equal(gradient, jax.jit(jax.grad(loss_of(lambda q: sj.yoso_attention(q, k, v, **SAMPLED))))(q))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int8", "uint8"])
def test_seeds_are_arrays_of_any_integer_dtype(dtype):
    q, k, v = small()
    traces = []

    @jax.jit
    def function(seed):
        traces.append(seed)
        return sj.yoso_attention(q, k, v, seed=seed)

    for seed in (0, 7, 100):
        expected = subquad.yoso_attention(*map(np.asarray, (q, k, v)), seed=seed)
        for given in (seed, np.int64(seed), np.array(seed), jnp.asarray(seed, dtype)):
            assert equal(sj.yoso_attention(q, k, v, seed=given), expected)
        assert equal(function(jnp.asarray(seed, dtype)), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("seed", [-4, 2**40, 2**64 - 1])
def test_wide_seeds_are_constants(seed):
    q, k, v = small()
    expected = subquad.yoso_attention(*map(np.asarray, (q, k, v)), seed=seed)
    assert equal(jax.jit(lambda q: sj.yoso_attention(q, k, v, seed=seed))(q), expected)


@pytest.mark.parametrize(
    "make",
    [lambda: jnp.float32(1), lambda: jnp.zeros(1, jnp.int32), lambda: jnp.bool_(True), lambda: jax.random.key(0)],
    ids=["float", "one_axis", "bool", "key"],
)
def test_other_seeds_are_refused(make):
    (q, k, v), seed = small(), make()
    function = lambda seed: sj.yoso_attention(q, k, v, seed=seed)  # noqa: E731
    for transformed in (function, jax.jit(function)):
        with pytest.raises(TypeError, match=r"\[yoso_attention\] seed: expected an integer or a 0-d integer array"):
            transformed(seed)


@pytest.mark.parametrize("heads", [(), (4,)])
@pytest.mark.parametrize("name", ["planes", "signs"])
def test_explicit_randomness_gets_no_gradient(name, heads):
    q, k, v = small()
    if name == "planes":
        given, options = jnp.asarray(subquad.random_normal((*heads, 5, 3, 16), seed=1)), {}
    else:
        given, options = jnp.asarray(subquad.random_signs((*heads, 3, 1, 64), seed=1)), dict(num_hashes=5, hash_bits=4)
    function = lambda q, given: sj.yoso_attention(q, k, v, **{name: given}, **options)  # noqa: E731
    expected = subquad.yoso_attention(*map(np.asarray, (q, k, v)), **{name: np.asarray(given)}, **options)
    assert equal(function(q, given), expected) and equal(jax.jit(function)(q, given), expected)
    dq, zeros = jax.grad(loss_of(function), (0, 1))(q, given)
    assert (dq != 0).any() and zeros.shape == given.shape and (zeros == 0).all()


# Errors come when jax traces


def can_be_said_in_jax(message, changes):
    """jax has no strides and no outputs, and without x64 no 64-bit arrays."""
    wide = any(is_array(x) and x.dtype.itemsize == 8 for x in changes.values())
    return not wide and "out" not in changes and "contiguous" not in message


JAX_ERRORS = [row for row in METHOD_ERRORS if can_be_said_in_jax(*row[1:])]


@pytest.mark.parametrize(("error", "message", "changes"), JAX_ERRORS, ids=[m[:48] for _, m, _ in JAX_ERRORS])
def test_errors(error, message, changes):
    given = ok(**changes)
    held = to_jax({n: x for n, x in given.items() if is_array(x)})
    others = {n: x for n, x in given.items() if n not in held}

    def function(held):
        given = held | others
        out = sj.yoso_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
        return (out[0] if isinstance(out, tuple) else out).sum()

    for transformed in (function, lambda held: jax.jit(function).lower(held), lambda held: jax.vjp(function, held)):
        with pytest.raises(error) as caught:
            transformed(held)
        text = str(caught.value)
        assert message in text and (text.startswith("[yoso_attention] ") or error is subquad.UnsupportedError)


def test_more_errors():
    q, k, v = small()
    with pytest.raises(TypeError, match=r"\[yoso_attention\] q: expected a jax array \(subquad.yoso_attention takes"):
        sj.yoso_attention(np.asarray(q), k, v)
    with pytest.raises(TypeError, match=r"\[yoso_attention\] key_mask: expected a jax array .*, got numpy.ndarray"):
        jax.jit(lambda q: sj.yoso_attention(q, k, v, key_mask=np.ones((2, 20), bool)))(q)
    with pytest.raises(TypeError, match="out"):
        sj.yoso_attention(q, k, v, out=q)
    with pytest.raises(ValueError, match=r"\[yoso_attention\] q: expected shape \[B, H, N, D\], got \[4, 20, 16\]"):
        jax.vmap(lambda q: sj.yoso_attention(q, k, v))(q)
    with pytest.raises(ValueError, match=r'\[collision_attention\] grad: expected "exact" or "lower_bound"'):
        jax.jit(lambda q: sj.collision_attention(q, k, v, 5, grad="sampled"))(q)


def test_float64_is_refused():
    jax.config.update("jax_enable_x64", True)
    try:
        x = jnp.ones((1, 2, 3, 8), jnp.float64)
        for transformed in (sj.yoso_attention, jax.jit(sj.yoso_attention)):
            with pytest.raises(TypeError, match=r"\[yoso_attention\] q: .*float64"):
                transformed(x, x, x)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_imports(monkeypatch, tmp_path):
    script = (
        "import sys, subquad; assert 'jax' not in sys.modules; import subquad.jax; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0\n")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match=r"\[subquad.jax\] jax: expected version 0.x .*, got 1.0"):
        _ffi._interface()
