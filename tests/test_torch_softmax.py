"""subquad.torch beyond hashing: every function is the plain one, bit for bit, under everything torch does to it."""

import inspect

import numpy as np
import pytest

import subquad
from adapter_cases import ADAPTER_CASES, BATCH, STATE_CASES, differentiable, flat, halves, plain_gradients, regrouped
from sparse_adapter_cases import SPARSE_CASES

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils import _pytree  # noqa: E402

import subquad.torch as st  # noqa: E402
from subquad._differentiable_sparse import flat_pattern  # noqa: E402

CASES = ADAPTER_CASES + SPARSE_CASES
BY_NAME = {case.name: case for case in CASES}
FUNCTIONS = sorted({case.function for case in CASES})
ONE_EACH = [next(c for c in reversed(CASES) if c.function == name) for name in FUNCTIONS]
CAST = [c for c in ONE_EACH if {"q", "v"} <= set(c.arrays)]
each = pytest.mark.parametrize("case", CASES, ids=str)
one_each = pytest.mark.parametrize("case", ONE_EACH, ids=str)


def to_torch(tree):
    return _pytree.tree_map(lambda x: torch.from_numpy(x.copy()), tree)


def leaves(case, requires_grad=True):
    return [to_torch(x).requires_grad_(requires_grad) for x in flat(case.arrays)]


def keywords(case):
    return to_torch(case.side) | case.options


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def run(case, values, module=st, **more):
    return as_tuple(
        getattr(module, case.function)(**regrouped(case.arrays, values), **keywords(case), **case.asks, **more)
    )


def cotangents(results):
    rng = np.random.default_rng(1)
    return [torch.from_numpy(rng.standard_normal(r.shape)).to(r.dtype) for r in results]


def equal(xs, ys):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_every_function_is_here():
    names = {name for name in subquad.__all__ if f"{name}_bwd" in subquad.__all__}
    hidden = {"bucket_attention", "l2_normalize", "sampled_proposals", "mixture_proposals", "mixture_weights"}
    assert names - hidden <= set(st.__all__) and set(FUNCTIONS) <= names | {"expand_values", "block_sum"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_take_the_keywords_of_the_plain_ones(name):
    here, there = (inspect.signature(getattr(module, name)).parameters for module in (st, subquad))
    assert list(here) == list(there)
    for key in there:
        assert (here[key].default, here[key].kind) == (there[key].default, there[key].kind), key


@each
def test_forward_and_gradients_are_the_plain_functions(case):
    values = leaves(case)
    results = run(case, values)
    with torch.no_grad():
        assert equal([x.detach() for x in results], run(case, values, subquad))
        assert equal([x.detach() for x in results], run(case, values))
    formed = differentiable(case, results)
    given = cotangents(formed)
    assert [r.requires_grad for r in results] == [i < len(formed) for i in range(len(results))]
    gradients = torch.autograd.grad(formed, values, given)
    arrays = regrouped(case.arrays, [x.detach() for x in values])
    expected = plain_gradients(case, arrays, to_torch(case.side), [r.detach() for r in results], given)
    assert len(values) == len(expected) and equal(gradients, expected)
    assert sum(bool((x == 0).all()) for x in gradients) == case.num_zero


@pytest.mark.parametrize("name", ["softmax_biased", "merge", "trig"])
def test_either_of_two_results_is_differentiated(name):
    case = BY_NAME[name]
    values = leaves(case)
    out, other = run(case, values)
    for i, x in enumerate((out, other)):
        alone = torch.autograd.grad(x.sum(), values, retain_graph=True, allow_unused=True)
        both = [torch.zeros_like(out), torch.zeros_like(other)]
        both[i] += 1
        expected = torch.autograd.grad((out, other), values, both, retain_graph=True)
        assert equal(alone, expected)


@each
def test_gradients_of_any_layout(case):
    values = leaves(case)
    results = differentiable(case, run(case, values))
    given = cotangents(results)
    expected = torch.autograd.grad(results, values, given, retain_graph=True)
    swapped = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in given]
    assert equal(torch.autograd.grad(results, values, swapped, retain_graph=True), expected)
    for i, x in enumerate(values):
        assert equal(torch.autograd.grad(results, [x], given, retain_graph=True), expected[i : i + 1])
    expanded = [torch.ones(()).expand(x.shape) for x in results]
    torch.autograd.grad(results, values, expanded)


def test_the_biases_gradient_is_that_of_the_formula():
    q, k, v, bias = (x.double().detach().requires_grad_() for x in leaves(BY_NAME["softmax_biased"]))
    heads = lambda x: x.repeat_interleave(2, 1)  # noqa: E731
    x = 0.5 * q @ heads(k).mT + bias[:, :, None]
    truth = torch.autograd.grad((x.softmax(-1) @ heads(v)).square().sum() + x.logsumexp(-1).sum(), (q, k, v, bias))
    single = [x.detach().float().requires_grad_() for x in (q, k, v, bias)]
    out, lse = st.softmax_attention(*single[:3], key_bias=single[3], scale=0.5, return_lse=True)
    gradients = torch.autograd.grad(out.square().sum() + lse.sum(), single)
    for x, y in zip(gradients, truth, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=1e-4, atol=1e-5)


# State


@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_a_state_is_handed_on(case):
    function, plain = getattr(st, case.function), getattr(subquad, case.function)
    state = expected = None
    for part in halves(case):
        given = {name: torch.from_numpy(x.copy()) for name, x in part.items()} | case.options
        out, state = function(**given, state=state, return_state=True)
        want, expected = plain(**given, state=expected, return_state=True)
        assert torch.equal(out, want) and len(state) == len(expected)
        for x, y in zip(state, expected, strict=True):
            assert (x is None and y is None) or equal([x], [y])
    assert torch.equal(function(**given, state=state), function(**given, state=state, return_state=True)[0])


@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_a_state_is_not_differentiated(case):
    given = {name: torch.from_numpy(x.copy()) for name, x in halves(case)[0].items()} | case.options
    given["v"].requires_grad_()
    function = getattr(st, case.function)
    out, state = function(**given, return_state=True)
    assert not any(x.requires_grad for x in state if x is not None)
    with pytest.raises(RuntimeError, match=rf"\[{case.function}\] backward: expected a call without state"):
        out.sum().backward()
    state[0].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"\[{case.function}\] state: expected arrays that do not require grad"):
        function(**given, state=state)
    with torch.no_grad():
        function(**given, state=state)


@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_opcheck_and_compilation_with_a_state(case):
    function = getattr(st, case.function)
    first, second = (
        {name: torch.from_numpy(x.copy()) for name, x in part.items()} | case.options for part in halves(case)
    )
    _, state = function(**first, return_state=True)
    groups = st._ops.__dict__[f"{case.function}_state".upper()].function.groups
    members = dict(zip(groups["state"], state, strict=True))
    operator = getattr(torch.ops.subquad, f"{case.function}_state").default
    torch.library.opcheck(operator, (), second | members)
    torch.library.opcheck(operator, (), first)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: function(**second, state=state, return_state=True), fullgraph=True, backend="aot_eager"
    )
    (out, new), (want, expected) = compiled(), function(**second, state=state, return_state=True)
    assert torch.equal(out, want) and equal(*([x for x in s if x is not None] for s in (new, expected)))


# What torch does to an operator


def members(case):
    """The keywords of a case as the schema has them."""
    groups = st._ops.__dict__[case.function.upper()].function.groups
    given, options = to_torch(case.side), dict(case.options)
    for name, x in case.arrays.items():
        given |= zip(groups[name], to_torch(x), strict=True) if name in groups else {name: to_torch(x)}
    if "pattern" in given:
        parts = flat_pattern(case.function, given.pop("pattern"), given["q"], given["k"])
        given |= {name: x for name, x in parts.items() if isinstance(x, torch.Tensor)}
        options |= {name: x for name, x in parts.items() if isinstance(x, int)}
    if "noise_std" in options and not isinstance(options["noise_std"], str):
        options["noise_std_value"] = options.pop("noise_std")
    return given, options


@each
def test_opcheck(case):
    given, options = members(case)
    names = st._ops.__dict__[case.function.upper()].function
    results = run(case, leaves(case, requires_grad=False))
    for x in (given[name] for name in names.arrays | names.optional if name in given):
        x.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.subquad, case.function).default, (), given | options)
    given = {name: x.detach() for name, x in given.items()}
    doubts = dict.fromkeys(f"d{name}" for name in names.differentiable)
    doubts |= dict(zip(doubts, cotangents(differentiable(case, results)), strict=False))
    saved = dict(zip(names.saved, results, strict=False))
    operator = getattr(torch.ops.subquad, f"{case.function}_bwd").default
    torch.library.opcheck(operator, (), doubts | given | options | saved)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@one_each
def test_compile_forward_and_backward(case, backend):
    torch._dynamo.reset()

    def function(*values):
        results = run(case, [values[0] * 2, *values[1:]])
        return [r + 1 for r in differentiable(case, results)]

    runs = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        values = leaves(case)
        results = f(*values)
        runs.append([*results, *torch.autograd.grad(results, values, cotangents(results))])
    for x, y in zip(*runs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


CALLS = {
    "softmax_attention": lambda q, seed: st.softmax_attention(q, q, q, window=(3, 0)),
    "segment_mean": lambda q, seed: st.segment_mean(q, segment_size=3),
    "rfa_attention": lambda q, seed: st.rfa_attention(q, q, q, num_features=4, seed=seed, is_causal=True),
    "randomized_attention": lambda q, seed: st.randomized_attention(q, q, q, seed=seed),
    "lara_attention": lambda q, seed: st.lara_attention(q, q, q, num_landmarks=3, seed=seed),
    "eva_attention": lambda q, seed: st.eva_attention(q, q, q, window=4, chunk_size=2, seed=seed),
}


@pytest.mark.parametrize("name", CALLS)
def test_compile_with_dynamic_lengths_and_seeds(name):
    torch._dynamo.reset()
    frames, function = [], CALLS[name]

    def backend(graph, inputs):
        # torch may start over once, where a float is an argument
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        frames.append(graph)
        return compiled

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for n, seed in ((5, 1), (9, 2), (14, 2**40), (23, -4)):
        q = torch.randn(2, 2, n, 8, requires_grad=True)
        for s in (seed, torch.tensor(seed)):
            runs = [torch.autograd.grad(f(q, s).square().sum(), q) for f in (compiled, function)]
            assert equal(*runs)
    assert len(frames) <= 2, "one graph for integer seeds, one for tensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CAST, ids=str)
def test_autocast_casts_q_k_v_and_only_them(case, dtype):
    values = leaves(case)
    cast = [x.to(dtype) if i < 3 else x for i, x in enumerate(values)]
    expected = differentiable(case, run(case, cast))
    function = lambda *values: run(case, values)  # noqa: E731
    torch._dynamo.reset()
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype):
            results = differentiable(case, f(*values))
        assert results[0].dtype == dtype and equal(results, expected)
        given = cotangents(results)
        gradients = (torch.autograd.grad(r, values, given, retain_graph=r is expected) for r in (results, expected))
        assert equal(*gradients)


def stacked(case, count=3):
    """The differentiable arrays with a leading axis: the values, then others in another order of items."""
    return [torch.stack([x.roll(i, 0) if i else x for i in range(count)]) for x in leaves(case, requires_grad=False)]


@pytest.mark.parametrize("which", ["all", "first"])
@each
def test_vmap(case, which):
    many = stacked(case)
    mapped = [which == "all" or i == 0 for i in range(len(many))]
    given = [x if m else x[0] for x, m in zip(many, mapped, strict=True)]
    loop = [run(case, [x[i] if m else x for x, m in zip(given, mapped, strict=True)]) for i in range(3)]
    out = torch.vmap(lambda *values: run(case, values), in_dims=tuple(0 if m else None for m in mapped))(*given)
    for x, *items in zip(out, *loop, strict=True):
        assert torch.equal(x, torch.stack(items))


@each
def test_functional_gradients(case):
    """torch.func: per-item gradients of every array, also of those without a batch axis, in either order."""
    many = stacked(case, 2)
    indices = tuple(range(len(many)))

    def loss(*values):
        results = differentiable(case, run(case, values))
        return sum((r.float() * (1 + torch.arange(r.numel()).reshape(r.shape) % 7)).sum() for r in results)

    def gradients(values):
        values = [x.clone().requires_grad_() for x in values]
        return torch.autograd.grad(loss(*values), values)

    loop = [gradients([x[i] for x in many]) for i in range(2)]
    per_item = torch.vmap(torch.func.grad(loss, indices))(*many)
    summed = torch.func.grad(lambda *many: torch.vmap(loss)(*many).sum(), indices)(*many)
    for x, y, *items in zip(per_item, summed, *loop, strict=True):
        torch.testing.assert_close(x, torch.stack(items), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, torch.stack(items), rtol=1e-5, atol=1e-5)


# Refusals


@one_each
def test_double_backward_raises(case):
    values = leaves(case)
    first = torch.autograd.grad(run(case, values)[0].square().sum(), values[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=rf"\[{case.function}\] backward: expected to be differentiated once"):
        first.sum().backward()


@one_each
def test_refusals(case):
    values = leaves(case)
    with pytest.raises(RuntimeError, match=r"subquad\.torch"):
        run(case, values, subquad)
    name = next(iter(case.arrays))
    with pytest.raises(TypeError, match=rf"\[{case.function}\] {name}: expected a torch tensor .*, got ndarray"):
        run(case, [values[0].detach().numpy(), *values[1:]])
    if "out" in inspect.signature(getattr(subquad, case.function)).parameters:
        with pytest.raises(TypeError, match=rf"\[{case.function}\] out: expected None.*use subquad.{case.function}"):
            run(case, values, out=values[0])
    with pytest.raises(TypeError, match="float64"):
        run(case, [x.double() for x in values])


@pytest.mark.parametrize(
    ("error", "sentence", "changes"),
    [
        (TypeError, "scale: expected a number, got str", dict(scale="1")),
        (TypeError, "scale: expected a number, got bool", dict(scale=True)),
        (TypeError, "is_causal: expected True or False, got int", dict(is_causal=1)),
        (TypeError, "key_mask: expected a torch tensor .*, got ndarray", dict(key_mask=np.ones((BATCH, 20), bool))),
        (TypeError, "seed: expected an integer, got float", dict(seed=1.5)),
        (TypeError, "state: expected a tuple of 3 arrays, got 2", dict(state=(None, None), is_causal=True)),
        (ValueError, "gate: ", dict(gate=torch.ones(BATCH, 2, 20))),
        (ValueError, 'features: expected .*got "fast"', dict(features="fast")),
    ],
    ids=str,
)
def test_errors(error, sentence, changes):
    q, k, v = (x.detach() for x in leaves(BY_NAME["rfa"]))
    with pytest.raises(error, match=rf"\[rfa_attention\] {sentence}"):
        st.rfa_attention(q, k, v, **changes)


def test_an_absent_result_is_refused():
    x, projection = leaves(BY_NAME["positive"])
    with pytest.raises(ValueError, match=r"\[feature_map\] log_factor: .*features='trig'"):
        st.feature_map(x, projection, return_log_factor=True)
    q, k, v = leaves(BY_NAME["rfa"])
    with pytest.raises(ValueError, match=r"\[rfa_attention\] lse: expected a call without a state"):
        st.rfa_attention(q, k, v, return_lse=True, return_state=True)
    with pytest.raises(TypeError, match=r"\[lara_attention\] landmarks: expected a tuple of 2 arrays, got Tensor"):
        st.lara_attention(x, x, x, landmarks=x)
