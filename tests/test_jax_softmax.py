"""subquad.jax beyond hashing: every function is the plain one, bit for bit, under jit, grad and vmap."""

import numpy as np
import pytest

import subquad
from adapter_cases import ADAPTER_CASES, STATE_CASES, differentiable, flat, halves, plain_gradients, regrouped
from sparse_adapter_cases import SPARSE_CASES

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

import subquad.jax as sj  # noqa: E402

CASES = ADAPTER_CASES + SPARSE_CASES
BY_NAME = {case.name: case for case in CASES}
FUNCTIONS = sorted({case.function for case in CASES})
ONE_EACH = [next(c for c in reversed(CASES) if c.function == name) for name in FUNCTIONS]
each = pytest.mark.parametrize("case", CASES, ids=str)


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def run(case, values, module=sj, convert=to_jax, **more):
    """The results for the differentiable arrays `values`, flattened."""
    given = regrouped(case.arrays, values) | convert(case.side)
    return as_tuple(getattr(module, case.function)(**given, **case.options, **case.asks, **more))


def cotangents(results):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(r.shape).astype(r.dtype) for r in results]


def equal(xs, ys):
    pairs = list(zip(jax.tree.leaves(xs), jax.tree.leaves(ys), strict=True))
    assert pairs
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_every_function_is_here():
    others = {"yoso_attention", "collision_attention", "sea_estimate", "teacher_blocks"}
    assert set(FUNCTIONS) | others == set(sj.__all__)


@each
def test_forward_and_gradients_are_the_plain_functions(case):
    values = flat(case.arrays)
    expected = run(case, values, subquad, lambda tree: tree)
    given = cotangents(differentiable(case, expected))
    gradients = plain_gradients(case, case.arrays, case.side, expected, given)

    def pull(values, given):
        results, pull = jax.vjp(lambda *values: differentiable(case, run(case, values)), *values)
        return results, pull(tuple(given))

    for transformed in (lambda *values: run(case, values), jax.jit(lambda *values: run(case, values))):
        results = transformed(*to_jax(values))
        assert all(isinstance(x, jax.Array) for x in results) and equal(results, expected)
    for transformed in (pull, jax.jit(pull)):
        results, pulled = transformed(to_jax(values), to_jax(given))
        assert equal(results, differentiable(case, expected)) and equal(pulled, gradients)


@pytest.mark.parametrize("name", ["softmax_biased", "merge", "trig"])
def test_either_of_two_results_is_differentiated(name):
    case = BY_NAME[name]
    values = to_jax(flat(case.arrays))
    for i in (0, 1):
        gradients = jax.jit(jax.grad(lambda values, i=i: run(case, values)[i].sum()))(values)
        given = [np.float32(j == i) * np.ones_like(x) for j, x in enumerate(run(case, values))]
        expected = run(case, flat(case.arrays), subquad, dict)
        assert equal(gradients, list(plain_gradients(case, case.arrays, case.side, expected, given)))


def test_results_without_a_gradient_pass_none():
    for name in ("segments", "rfa", "lara", "eva"):
        case = BY_NAME[name]
        gradients = jax.grad(lambda values, case=case: run(case, values)[1].astype(jnp.float32).sum())(
            to_jax(flat(case.arrays))
        )
        assert all((x == 0).all() for x in gradients)


def stacked(case, count=2):
    """The differentiable arrays with a leading axis: the values, then others in another order of items."""
    return [jnp.stack([jnp.roll(x, i, 0) for i in range(count)]) for x in to_jax(flat(case.arrays))]


@each
def test_vmap_and_grad_in_either_order(case):
    many = stacked(case)

    def loss(*values):
        results = differentiable(case, run(case, values))
        return sum((r * (1 + jnp.arange(r.size).reshape(r.shape) % 7)).sum() for r in results)

    for mapped in ([True] * len(many), [i == 0 for i in range(len(many))]):
        given = [x if m else x[0] for x, m in zip(many, mapped, strict=True)]
        loop = [run(case, [x[i] if m else x for x, m in zip(given, mapped, strict=True)]) for i in range(2)]
        transformed = jax.vmap(lambda *values: run(case, values), tuple(0 if m else None for m in mapped))
        expected = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
        assert equal(jax.jit(transformed)(*given), expected)
    gradient = jax.grad(loss, tuple(range(len(many))))
    each = [gradient(*(x[i] for x in many)) for i in range(2)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
    summed = jax.grad(lambda *many: jax.vmap(loss)(*many).sum(), tuple(range(len(many))))
    for got in (jax.jit(jax.vmap(gradient))(*many), summed(*many)):
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rfa", "randomized", "lara_drawn", "eva"])
def test_seeds_are_arrays(name):
    case, traces = BY_NAME[name], []
    values = to_jax(flat(case.arrays))
    function = getattr(sj, case.function)
    options = {n: x for n, x in case.options.items() if n != "seed"}

    @jax.jit
    def compiled(seed):
        traces.append(seed)
        return function(**regrouped(case.arrays, values), **to_jax(case.side), **options, seed=seed)

    for seed in (0, 7):
        expected = function(**regrouped(case.arrays, values), **to_jax(case.side), **options, seed=seed)
        assert equal(compiled(jnp.int32(seed)), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_a_state_is_handed_on_and_not_differentiated(case):
    function, plain = getattr(sj, case.function), getattr(subquad, case.function)
    for wrap in (lambda f: f, jax.jit):
        step = wrap(lambda given, state: function(**given, **case.options, state=state, return_state=True))
        state = expected = None
        for part in halves(case):
            out, state = step(to_jax(part), state)
            want, expected = plain(**part, **case.options, state=expected, return_state=True)
            assert equal((out, state), (want, expected))
    with pytest.raises(RuntimeError, match=rf"\[{case.function}\] backward: expected a call without state"):
        part = to_jax(halves(case)[0])
        jax.grad(lambda v: step(part | {"v": v}, None)[0].sum())(part["v"])


# Errors come when jax traces


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_errors_of_shape_and_kind(case):
    values = to_jax(flat(case.arrays))
    first, name = values[0], next(iter(case.arrays))
    for transformed in (lambda *v: run(case, v), jax.jit(lambda *v: run(case, v))):
        with pytest.raises(ValueError, match=rf"\[{case.function}\]"):
            transformed(first[0], *values[1:])
    with pytest.raises(TypeError, match=rf"\[{case.function}\] {name}: expected a jax array .*, got numpy.ndarray"):
        run(case, [np.asarray(first), *values[1:]])


@pytest.mark.parametrize(
    ("name", "error", "sentence", "changes"),
    [
        ("softmax", ValueError, "scale: ", dict(scale=-1.0)),
        ("softmax", ValueError, "window_left: ", dict(window=(-3, 0))),
        ("rfa", ValueError, 'features: expected .*got "fast"', dict(features="fast")),
        ("rfa", TypeError, "state: expected a tuple of 3 arrays, got 2", dict(state=(None, None), return_lse=False)),
        ("rfa_elu", ValueError, "lse: expected features='positive' or 'hyperbolic'", dict(return_lse=True)),
        ("lara_drawn", ValueError, "mis: ", dict(mis="best")),
        ("eva_causal", ValueError, "window: ", dict(window=0)),
        ("randomized_given", ValueError, "grad: ", dict(grad="biased")),
        ("lara_landmarks", ValueError, "noise: ", dict(noise=np.ones((2, 4, 7, 8), np.float32))),
        ("softmax", subquad.UnsupportedError, "q", dict(q=np.ones((2, 4, 20, 600), np.float32))),
    ],
)
def test_errors(name, error, sentence, changes):
    case = BY_NAME[name]
    given = to_jax(case.arrays | case.side) | case.options | case.asks
    given |= {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in changes.items()}
    if given["q"].shape[-1] == 600:
        given["k"] = jnp.ones((2, 2, 20, 600))
    held = {n: x for n, x in given.items() if isinstance(x, (jax.Array, tuple)) and n not in ("state", "window")}
    others = {n: x for n, x in given.items() if n not in held}
    for transformed in (lambda f: f(held), lambda f: jax.jit(f).lower(held)):
        with pytest.raises(
            error, match=rf"\[{case.function}\] {sentence}" if error is not subquad.UnsupportedError else ""
        ):
            transformed(lambda held: getattr(sj, case.function)(**held, **others))


def test_second_derivatives_and_forward_mode_raise():
    case = BY_NAME["softmax"]
    values = to_jax(flat(case.arrays))
    function = lambda q: run(case, [q, *values[1:]])[0].sum()  # noqa: E731
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(function, (values[0],), (values[0],))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda q: jax.grad(function)(q).sum())(values[0])
