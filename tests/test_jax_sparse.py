"""subquad.jax: patterns as arguments and results, what has no derivative, and refusals of sparse attention and SEA.

What all functions have in common is in test_jax_softmax.py, with cases of these too.
"""

import numpy as np
import pytest

import subquad
from adapter_cases import SEQ, flat
from sparse_adapter_cases import SEQ_K, SPARSE_CASES, TEACHER_CASES, estimate
from sparse_cases import public, random_csr
from test_jax_softmax import equal, run, to_jax

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

import subquad.jax as sj  # noqa: E402
from subquad import BlockPattern  # noqa: E402
from subquad._function import Function  # noqa: E402

BY_NAME = {case.name: case for case in SPARSE_CASES}
PATTERNS = ["list", "list_pair", "csr", "csr_weights", "blocks", "blocks_masked"]
each_pattern = pytest.mark.parametrize("name", PATTERNS)


def call_of(case):
    """The case as a function of q and the pattern."""
    given = to_jax({name: x for name, x in case.arrays.items() if name != "q"})
    return lambda q, pattern: sj.sparse_attention(q, pattern=pattern, return_lse=True, **given, **case.options)


def as_arguments(case):
    return to_jax(case.arrays["q"]), to_jax(case.side["pattern"])


# Patterns


@each_pattern
def test_patterns_are_arguments_of_jit(name):
    case, traces = BY_NAME[name], []
    q, pattern = as_arguments(case)
    function, expected = call_of(case), call_of(case)(q, pattern)

    @jax.jit
    def compiled(q, pattern):
        traces.append(pattern)
        return function(q, pattern)

    assert equal(compiled(q, pattern), expected)
    assert equal(compiled(q, case.side["pattern"]), expected), "as numpy arrays"
    assert equal(compiled(-q, jax.tree.map(lambda x: x + 0, pattern)), function(-q, pattern))
    assert len(traces) == 1
    assert equal(jax.jit(lambda q: function(q, pattern))(q), expected), "as a constant"
    loss = lambda q, pattern: function(q, pattern)[0].sum()  # noqa: E731
    assert equal(jax.jit(jax.grad(loss))(q, pattern), jax.grad(loss)(q, pattern))


@each_pattern
def test_vmap_over_patterns(name):
    case = BY_NAME[name]
    q, first = as_arguments(case)
    function = call_of(case)
    csr = name.startswith("csr")
    # Another one of the same size: the keys of the other item, or other weights.
    second = jax.tree.map(lambda x: jnp.flip(x, 0) if not csr or x.dtype == jnp.float32 else x, first)
    both = jax.tree.map(lambda *xs: jnp.stack(xs), first, second)
    for axes, of in ((0, lambda i: q + i), (None, lambda i: q)):
        mapped = jax.vmap(function, (axes, 0))
        given = jnp.stack([q, q + 1]) if axes == 0 else q
        expected = jax.tree.map(lambda *xs: jnp.stack(xs), function(of(0), first), function(of(1), second))
        assert equal(mapped(given, both), expected) and equal(jax.jit(mapped)(given, both), expected)


def test_a_pattern_of_another_structure_is_compiled_again():
    case = BY_NAME["blocks"]
    q, pattern = as_arguments(case)
    parts = dict(K=pattern.K, positions=pattern.positions, num_keys=pattern.num_keys)
    other = BlockPattern(bits=pattern.bits, visible=pattern.visible, block_cap=1, **parts)
    compiled = jax.jit(call_of(case))
    assert not equal(compiled(q, pattern), compiled(q, other))
    assert equal(compiled(q, other), call_of(case)(q, other))


@pytest.mark.parametrize("name", ["sea", "sea_one_context", "sea_causal_masked"])
def test_sea_returns_its_pattern(name):
    case = BY_NAME[name]
    values = flat(case.arrays)
    *_, expected = run(case, values, subquad, dict, return_pattern=True)
    function = lambda *values: run(case, values, return_pattern=True)  # noqa: E731
    for f in (function, jax.jit(function)):
        *_, pattern = f(*to_jax(values))
        assert isinstance(pattern, BlockPattern) and equal(pattern, expected)
        assert (pattern.K, pattern.block_cap, pattern.shape) == (expected.K, expected.block_cap, expected.shape)
    many = [jnp.stack([x, jnp.roll(x, 1, 0)]) for x in to_jax(values)]
    *_, mapped = jax.jit(jax.vmap(function))(*many)
    *_, second = function(*(x[1] for x in many))
    assert equal(mapped, jax.tree.map(lambda *xs: jnp.stack(xs), expected, second))


# Without a derivative


@pytest.mark.parametrize("case", TEACHER_CASES, ids=str)
def test_teachers_are_constants(case):
    expected = subquad.teacher_blocks(**case.side, **case.options)
    given = to_jax(case.side)
    function = lambda q: sj.teacher_blocks(**given | {"q": q}, **case.options)  # noqa: E731
    assert equal(function(given["q"]), expected) and equal(jax.jit(function)(given["q"]), expected)
    many = jnp.stack([given["q"], given["q"][::-1]])
    assert equal([x[1] for x in jax.jit(jax.vmap(function))(many)], function(many[1]))
    for wrap in (lambda f: f, jax.jit):
        assert not wrap(jax.grad(lambda q: function(q)[0].sum()))(given["q"]).any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_estimate(causal, masked):
    arrays, weights, options = estimate(causal, masked=masked)
    expected = subquad.sea_estimate(**arrays, weights=weights, **options)
    arrays, weights = to_jax((arrays, weights))
    function = lambda q, weights: sj.sea_estimate(**arrays | {"q": q}, weights=weights, **options)  # noqa: E731
    assert equal(function(arrays["q"], weights), expected)
    assert equal(jax.jit(function)(arrays["q"], weights), expected)
    many = jnp.stack([arrays["q"], arrays["q"][::-1]])
    for axes, given in (((0, None), weights), ((0, 0), jax.tree.map(lambda x: jnp.stack([x, x]), weights))):
        out = jax.jit(jax.vmap(function, axes))(many, given)
        assert equal([x[1] for x in out], function(many[1], weights))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_estimate_is_handed_on_and_not_differentiated(wrap):
    arrays, weights, options = estimate(True)
    step = wrap(
        lambda part, state: sj.sea_estimate(**part, weights=to_jax(weights), **options, state=state, return_state=True)
    )
    state = expected = None
    for cut in (slice(0, 7), slice(7, 8), slice(8, SEQ)):
        part = {n: x[:, cut] if n == "key_mask" else x[:, :, cut] for n, x in arrays.items()}
        *results, state = step(to_jax(part), state)
        *want, expected = subquad.sea_estimate(**part, weights=weights, **options, state=expected, return_state=True)
        assert equal((results, state), (want, expected))
    sentence = r"\[sea_estimate\] backward: .*subquad.torch.SeaAttention trains the weights"
    given = to_jax(arrays)
    with pytest.raises(RuntimeError, match=sentence):
        jax.grad(lambda q: step(given | {"q": q}, None)[0].sum())(given["q"])
    function = wrap(lambda weights: sj.sea_estimate(**given, weights=weights, **options)[0].sum())
    with pytest.raises(RuntimeError, match=sentence):
        jax.grad(function)(to_jax(weights))


# What tracing costs, and refuses


@pytest.mark.parametrize("case", [*SPARSE_CASES, *TEACHER_CASES], ids=str)
def test_tracing_runs_the_functions_on_one_token(case, monkeypatch):
    seen = []

    def spy(self, plain=Function.run, **given):
        seen.append(given)
        return plain(self, **given)

    monkeypatch.setattr(Function, "run", spy)
    jax.jit(lambda *values: run(case, values)).lower(*to_jax(flat(case.arrays)))
    assert len(seen) == (0 if case.name.startswith("csr") else 1)
    for given in seen:
        arrays = {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
        assert all(x.shape[0] == 1 and not {SEQ, SEQ_K, 17} & set(x.shape) for x in arrays.values())
        assert all(given.get(name) in (None, 1) for name in ("num_keys", "num_queries"))


Q, K, LIST = np.zeros((2, 4, SEQ, 8), np.float32), np.zeros((2, 4, SEQ_K, 8), np.float32), np.zeros((2, 1, SEQ, 3), int)
SPARSE = dict(q=Q, k=K, v=K, pattern=LIST.astype(np.int32))
SEA = dict(q=Q, k=K, v=K, probs=np.ones((2, 4, SEQ, 8), np.float32))
EXPAND, SUM = dict(x=SEA["probs"], num_keys=SEQ_K), dict(y=np.ones((2, 4, SEQ, SEQ_K), np.float32), num_columns=8)
ROWS, KEPT = np.ones((2, 4, SEQ), np.float32), np.ones((2, SEQ), bool)
NO_PATTERN = "pattern: expected an array of indices, a pair .*, a CsrPattern or a BlockPattern, got"


@pytest.mark.parametrize(
    ("function", "given", "error", "sentence"),
    [
        ("sparse_attention", SPARSE | dict(pattern=None), TypeError, f"{NO_PATTERN} NoneType"),
        ("sparse_attention", SPARSE | dict(scale=-1.0), ValueError, "scale: "),
        ("sparse_attention", SPARSE | dict(pattern=LIST.astype(np.float32)), TypeError, "indices: .*got float32"),
        (
            "sparse_attention",
            SPARSE | dict(pattern=public(random_csr(2, 4, 9, 9, index=np.int32))),
            ValueError,
            "pattern: expected shape .* = .2, 4, 20, 23., got .2, 4, 9, 9.",
        ),
        ("sparse_attention", SPARSE | dict(row_scale=ROWS[:, :, 1:]), ValueError, "row_scale: expected .*20.*got .*19"),
        ("sea_attention", SEA | dict(context=Q), ValueError, "context: expected mix with it, got none"),
        ("sea_attention", SEA | dict(context=Q[:, :, :7], mix=ROWS), ValueError, "context: expected shape .*got .*7"),
        ("sea_attention", SEA | dict(group="rows"), ValueError, 'group: expected .*, got "rows"'),
        ("sea_attention", SEA | dict(group="head", is_causal=True), ValueError, "group: expected .*is_causal"),
        ("sea_attention", SEA | dict(top_k=0.5), ValueError, "top_k: "),
        ("expand_values", EXPAND | dict(num_keys=2.5), TypeError, "num_keys: expected an integer, got float"),
        ("expand_values", EXPAND | dict(num_keys=True), TypeError, "num_keys: expected an integer, got bool"),
        ("expand_values", EXPAND | dict(num_keys=-1), ValueError, "num_keys: "),
        ("expand_values", EXPAND | dict(key_mask=KEPT), ValueError, "key_mask: expected .*23.*, got .*20"),
        ("block_sum", SUM | dict(num_columns=0), ValueError, "num_columns: "),
        ("block_sum", SUM | dict(key_mask=KEPT), ValueError, "key_mask: expected .*23.*, got .*20"),
        ("running_mean", dict(v=K, num_queries=-1), ValueError, "num_queries: "),
        ("running_mean", dict(v=K, state=(K,)), TypeError, "state: expected a tuple of 2 arrays, got 1"),
        ("sea_estimate", dict(q=Q, k=Q, v=Q, weights=[]), TypeError, "weights: expected a mapping"),
        ("sea_estimate", dict(q=Q, k=Q, v=Q, weights={}), ValueError, "weights: expected projection among them"),
    ],
)  # fmt: skip
def test_errors(function, given, error, sentence):
    held = {n: to_jax(x) for n, x in given.items() if not isinstance(x, (int, float, str)) and n != "state"}
    others = {n: to_jax(x) if n == "state" else x for n, x in given.items() if n not in held}
    for transformed in (lambda f: f(held), lambda f: jax.jit(f).lower(held)):
        with pytest.raises(error, match=rf"\[{function}\] {sentence}"):
            transformed(lambda held: getattr(sj, function)(**held, **others))


def test_errors_of_compressed_rows_come_when_they_run():
    case = BY_NAME["csr"]
    (q, pattern), k = as_arguments(case), to_jax(case.arrays["k"])
    backwards = jax.tree.map(lambda x: x[::-1], pattern)
    for given, scale, name in ((pattern, -1.0, "scale"), (backwards, 1.0, "indptr")):
        compiled = jax.jit(lambda pattern, scale=scale: sj.sparse_attention(q, k, k, pattern, scale=scale))
        compiled.lower(given)
        with pytest.raises(Exception, match=rf"\[sparse_attention\] .*{name}: expected"):
            jax.block_until_ready(compiled(given))


def test_empty_extents():
    x, empty = jnp.ones((1, 2, 3, 8)), jnp.ones((1, 2, 0, 8))
    nothing = -jnp.ones((1, 1, 3, 4), jnp.int32)
    for wrap in (lambda f: f, jax.jit):
        assert not wrap(sj.sparse_attention)(x, empty, empty, nothing).any()
        assert wrap(lambda x: sj.expand_values(x, 0))(x).shape == (1, 2, 3, 0)
        assert wrap(sj.running_mean)(empty).shape == empty.shape
        assert wrap(lambda *given: sj.sea_attention(*given, top_k=2))(empty, x, x, empty).shape == empty.shape
        assert not wrap(lambda *given: sj.sea_attention(*given, top_k=2))(x, empty, empty, x).any()
