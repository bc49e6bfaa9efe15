"""subquad.torch: patterns as arguments and results, what has no derivative, and refusals of sparse attention and SEA.

What all functions have in common is in test_torch_softmax.py, with cases of these too.
"""

import inspect

import pytest

import subquad
from adapter_cases import BATCH, SEQ
from sparse_adapter_cases import COLUMNS, SEQ_K, SPARSE_CASES, TEACHER_CASES, estimate
from sparse_cases import masks, probabilities, public, random_blocks, random_csr, random_indices
from test_torch_softmax import as_tuple, cotangents, equal, keywords, leaves, run, to_torch

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils import _pytree  # noqa: E402

import subquad.torch as st  # noqa: E402
from subquad import BlockPattern  # noqa: E402

BY_NAME = {case.name: case for case in SPARSE_CASES}
PATTERNS = ["list", "list_pair", "csr", "csr_weights", "blocks", "blocks_masked"]
KINDS = ["list", "pair", "csr", "blocks"]


def tensors_of(pattern):
    return [x for x in _pytree.tree_leaves(pattern) if isinstance(x, torch.Tensor)]


def pattern_of(kind, seq):
    """A pattern of 4 heads and `seq` queries and keys."""
    made = {
        "list": lambda: random_indices(2, 1, seq, seq, 5),
        "pair": lambda: random_indices(2, 4, seq, seq, 5, weighted=True),
        "csr": lambda: random_csr(2, 4, seq, seq, weighted=True),
        "blocks": lambda: random_blocks(2, 4, seq, seq, 8, 3, **masks(2, seq, seq)),
    }[kind]()
    return public(made, lambda x: torch.from_numpy(x.copy()))


# Patterns


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_trees(name):
    pattern = to_torch(BY_NAME[name].side["pattern"])
    leaves, spec = _pytree.tree_flatten(pattern)
    again = _pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(pattern) and all(isinstance(x, torch.Tensor) for x in leaves)
    for field in ("shape", "K", "block_cap", "num_keys") if not isinstance(pattern, (torch.Tensor, tuple)) else ():
        assert getattr(again, field, None) == getattr(pattern, field, None)
    assert all(x is y for x, y in zip(leaves, tensors_of(again), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["csr", "blocks"])
def test_patterns_in_files_and_exported_programs(kind, tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, q, pattern):
            return st.sparse_attention(q, q, q, pattern)

    q, pattern = torch.randn(2, 4, 9, 8), pattern_of(kind, 9)
    torch.save(pattern, tmp_path / "pattern.pt")
    assert equal(tensors_of(torch.load(tmp_path / "pattern.pt", weights_only=True)), tensors_of(pattern))
    torch.export.save(torch.export.export(Layer(), (q, pattern)), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(loaded(q, pattern), Layer()(q, pattern))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_functions_take_patterns_of_any_length(kind):
    torch._dynamo.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(q, pattern):
        return st.sparse_attention(q * 2, q, q, pattern, return_lse=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for seq in (9, 14, 23, 31):
        q, pattern = torch.randn(2, 4, seq, 8, requires_grad=True), pattern_of(kind, seq)
        got, expected = compiled(q, pattern), function(q, pattern)
        given = cotangents(expected)
        assert equal(got, expected)
        assert equal(torch.autograd.grad(got, q, given), torch.autograd.grad(expected, q, given))
    assert len(frames) <= 2, "one graph for all lengths, and one more where torch starts with a static shape"


@pytest.mark.parametrize("name", ["sea", "sea_one_context", "sea_causal_masked"])
def test_sea_returns_its_pattern(name):
    case = BY_NAME[name]
    values = leaves(case, requires_grad=False)
    *_, expected = run(case, values, subquad, return_pattern=True)
    torch._dynamo.reset()
    function = lambda *values: run(case, values, return_pattern=True)  # noqa: E731
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        *_, pattern = f(*values)
        assert isinstance(pattern, BlockPattern) and pattern.shape == expected.shape
        assert (pattern.K, pattern.block_cap) == (expected.K, expected.block_cap)
        assert equal(tensors_of(pattern), tensors_of(expected))
    stacked = [torch.stack([x, x.roll(1, 0)]) for x in values]
    *_, pattern = torch.vmap(function)(*stacked)
    *_, second = function(*(x[1] for x in stacked))
    pairs = zip(tensors_of(expected), tensors_of(second), strict=True)
    assert equal(tensors_of(pattern), map(torch.stack, pairs))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_patterns(kind):
    q = torch.randn(3, 2, 4, 9, 8)
    first, second = pattern_of(kind, 9), pattern_of(kind, 9)
    # Another one of the same size: the keys of the other item.
    flipped = [x.flip(0) for x in tensors_of(second)]
    if kind == "csr":
        flipped = [second.indptr, second.indices, second.log_weights.flip(0)]
    second = _pytree.tree_unflatten(flipped, _pytree.tree_structure(second))
    both = _pytree.tree_map(lambda x, y: torch.stack([x, y, x]), first, second)
    function = lambda q, pattern: st.sparse_attention(q, q, q, pattern, return_lse=True)  # noqa: E731
    loop = [function(x, pattern) for x, pattern in zip(q, (first, second, first), strict=True)]
    assert equal(torch.vmap(function)(q, both), map(torch.stack, zip(*loop, strict=True)))
    loop = [function(q[0], pattern) for pattern in (first, second, first)]
    assert equal(torch.vmap(function, (None, 0))(q[0], both), map(torch.stack, zip(*loop, strict=True)))


@pytest.mark.parametrize("name", ["list_pair", "csr_weights"])
def test_weights_of_a_pattern_are_constants(name):
    case = BY_NAME[name]
    values = leaves(case)
    pattern = to_torch(case.side["pattern"])
    weights = pattern[1] if isinstance(pattern, tuple) else pattern.log_weights
    weights.requires_grad_()
    out = st.sparse_attention(*values[:3], pattern, row_scale=values[3])
    gradients = torch.autograd.grad(out.sum(), [*values, weights], allow_unused=True)
    assert gradients[-1] is None
    assert equal(gradients[:-1], torch.autograd.grad(run(case, values)[0].sum(), values))
    fixed = [x.detach() for x in values]
    out = st.sparse_attention(*fixed[:3], pattern)
    assert equal([out.detach()], [st.sparse_attention(*fixed[:3], to_torch(case.side["pattern"]))])


def test_inputs_of_any_layout_and_the_same_bits_every_time():
    for name in ("csr_weights", "blocks_masked", "sea_causal_masked"):
        case = BY_NAME[name]
        values = leaves(case)
        views = (x.detach().movedim(-2, 0).contiguous().movedim(0, -2) for x in values)
        swapped = [x.requires_grad_() for x in views]
        results, again = run(case, values), run(case, swapped)
        given = cotangents(results)
        assert equal(results, again)
        torch.use_deterministic_algorithms(True)
        try:
            gradients = torch.autograd.grad(results, values, given, retain_graph=True)
            assert equal(gradients, torch.autograd.grad(results, values, given))
            assert equal(gradients, torch.autograd.grad(again, swapped, given))
        finally:
            torch.use_deterministic_algorithms(False)


# Autocast


@pytest.mark.parametrize("name", ["sea_context", "sea_one_context"])
def test_autocast_casts_the_context_and_keeps_float32_rows(name):
    case = BY_NAME[name]
    values = leaves(case)
    cast = [x.bfloat16() if i in (0, 1, 2, len(values) - 1) else x for i, x in enumerate(values)]
    with torch.autocast("cpu", torch.bfloat16):
        out = run(case, values)[0]
    assert out.dtype == torch.bfloat16 and equal([out], run(case, cast)[:1])
    gradients = torch.autograd.grad(out.float().sum(), values, allow_unused=True)
    assert [x.dtype for x in gradients] == [torch.float32] * len(values)


def test_autocast_of_teachers():
    for case in (BY_NAME["divergence_masked"], TEACHER_CASES[1]):
        with torch.autocast("cpu", torch.bfloat16):
            results = run(case, leaves(case))
        low = {name: x.bfloat16() if x.dtype == torch.float32 else x for name, x in to_torch(case.side).items()}
        values = dict(zip(case.arrays, (x.bfloat16() for x in leaves(case)), strict=True))
        expected = getattr(st, case.function)(**values, **low, **case.options)
        assert results[0].dtype == torch.float32 and equal(results, expected)


# Without a derivative


@pytest.mark.parametrize("case", TEACHER_CASES, ids=str)
def test_teachers_are_constants(case):
    given = keywords(case)
    expected = subquad.teacher_blocks(**given)
    needs = given | {name: given[name].clone().requires_grad_() for name in "qk"}
    results = st.teacher_blocks(**needs)
    assert equal(results, expected) and not any(x.requires_grad for x in results)
    torch.library.opcheck(torch.ops.subquad.teacher_blocks.default, (), given)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: st.teacher_blocks(**given | {"q": q}), fullgraph=True, backend="aot_eager")
    assert equal(compiled(needs["q"]), expected)
    many = torch.stack([given["q"], given["q"].flip(0)])
    out = torch.vmap(lambda q: st.teacher_blocks(**given | {"q": q}))(many)
    assert equal([x[1] for x in out], st.teacher_blocks(**given | {"q": many[1]}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_estimate(causal, masked):
    (arrays, weights), options = to_torch(estimate(causal, masked=masked)[:2]), {"is_causal": causal}
    expected = subquad.sea_estimate(**arrays, weights=weights, **options)
    function = lambda q, weights: st.sea_estimate(**arrays | {"q": q}, weights=weights, **options)  # noqa: E731
    torch._dynamo.reset()
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        assert equal(f(arrays["q"], weights), expected)
    torch.library.opcheck(torch.ops.subquad.sea_estimate.default, (), arrays | weights | options)
    many = torch.stack([arrays["q"], arrays["q"].flip(0)])
    for x, y in zip(torch.vmap(function, (0, None))(many, weights), function(many[1], weights), strict=True):
        assert torch.equal(x[1], y)


def test_an_estimate_is_handed_on():
    arrays, weights = to_torch(estimate(True)[:2])
    whole, state, pieces = st.sea_estimate(**arrays, weights=weights, is_causal=True), None, []
    step = lambda part, state: st.sea_estimate(  # noqa: E731
        **part, weights=weights, is_causal=True, state=state, return_state=True
    )
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for cut in (slice(0, 7), slice(7, 8), slice(8, SEQ)):
        part = {n: x[:, cut] if n == "key_mask" else x[:, :, cut].contiguous() for n, x in arrays.items()}
        before = state
        *results, state = step(part, before)
        *again, new = compiled(part, before)
        assert equal([*results, *state], [*again, *new])
        expected = subquad.sea_estimate(**part, weights=weights, is_causal=True, state=before, return_state=True)
        assert equal([*results, *state], [*expected[:3], *expected[3]])
        pieces.append(results)
    for x, *parts in zip(whole, *pieces, strict=True):
        torch.testing.assert_close(torch.cat(parts, 2), x, rtol=1e-5, atol=1e-5)
    members = dict(zip(("state_s", "state_z", "state_rows1", "state_rows2", "state_count"), state, strict=True))
    given = arrays | weights | {"is_causal": True}
    torch.library.opcheck(torch.ops.subquad.sea_estimate_state.default, (), given | members)


def test_a_differentiated_estimate_says_what_trains_it():
    arrays, weights = to_torch(estimate(True)[:2])
    sentence = r"\[sea_estimate\] backward: expected results that are not differentiated, .*subquad.torch.SeaAttention"
    for name, given in (("q", arrays), ("conv1_weight", weights)):
        given[name].requires_grad_()
        for state in ({}, {"return_state": True}):
            results = st.sea_estimate(**arrays, weights=weights, is_causal=True, **state)
            with pytest.raises(RuntimeError, match=sentence):
                results[0].sum().backward()
        given[name].requires_grad_(False)


# Lengths


def masked(seq):
    return {name: x if isinstance(x, bool) else torch.from_numpy(x) for name, x in masks(2, seq, seq).items()}


def probs_of(seq):
    return torch.from_numpy(probabilities(2, 4, seq, 8))


CALLS = {
    "sea_attention": lambda q, more: st.sea_attention(q, q, q, more["probs"], top_k=3, mix=more["mix"], is_causal=True),
    "running_mean": lambda q, more: st.running_mean(q, num_queries=q.shape[2] - 2),
    "block_pool": lambda q, more: st.block_pool(q, more["probs"], **more["masks"]),
    "expand_values": lambda q, more: st.expand_values(q, q.shape[2] + 3, is_causal=True),
    "block_sum": lambda q, more: st.block_sum(q @ q.mT, 6, is_causal=True),
    "attention_divergence": lambda q, more: st.attention_divergence(q * 2, q, q, q, is_causal=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_compile_with_dynamic_lengths(name):
    torch._dynamo.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend=backend)
    for seq in (9, 14, 23, 31):
        q = torch.randn(2, 4, seq, 8, requires_grad=True)
        more = {"probs": probs_of(seq), "mix": torch.rand(2, 4, seq), "masks": masked(seq)}
        more["masks"].pop("is_causal")
        runs = [torch.autograd.grad(as_tuple(f(q, more))[0].square().sum(), q) for f in (compiled, CALLS[name])]
        assert equal(*runs)
    assert len(frames) == 1


def test_the_functions_take_the_keywords_of_the_plain_ones():
    for name in ("teacher_blocks", "sea_estimate"):
        here, there = (inspect.signature(getattr(module, name)).parameters for module in (st, subquad))
        assert list(here) == list(there) and [p.default for p in here.values()] == [p.default for p in there.values()]


# Refusals

Q, K = torch.zeros(BATCH, 4, SEQ, 8), torch.zeros(BATCH, 2, SEQ_K, 8)
LIST = torch.zeros(BATCH, 1, SEQ, 3, dtype=torch.int32)
NO_ARRAYS = "pattern: expected an array of indices, a pair .*, a CsrPattern or a BlockPattern, got"


@pytest.mark.parametrize(
    ("error", "sentence", "changes"),
    [
        (TypeError, f"{NO_ARRAYS} NoneType", dict(pattern=None)),
        (TypeError, f"{NO_ARRAYS} str", dict(pattern="dense")),
        (ValueError, "pattern: expected a pair .*, got 3 values", dict(pattern=(LIST, LIST, LIST))),
        (TypeError, "indices: expected a torch tensor .*, got ndarray", dict(pattern=LIST.numpy())),
        (TypeError, "pattern indices: expected an array, got NoneType", dict(pattern=(None, LIST))),
        (TypeError, "pattern bits: expected an array, got NoneType", dict(pattern=BlockPattern(None, 8, LIST, 3))),
        (TypeError, "indices: expected dtype int32, got int64", dict(pattern=LIST.long())),
        (ValueError, "pattern: expected shape .* = .2, 4, 20, 23., got", dict(pattern=pattern_of("csr", 9))),
        (ValueError, "pattern: expected num_keys = M = 23, got 9", dict(pattern=pattern_of("blocks", 9))),
        (ValueError, "indices: expected .*-1.*got 23", dict(pattern=LIST + SEQ_K)),
        (TypeError, "q: expected a torch tensor .*, got list", dict(q=[1.0])),
        (ValueError, "k: expected shape", dict(k=K[0], pattern=pattern_of("csr", 9))),
        (ValueError, "q: expected shape", dict(q=Q[0])),
        (TypeError, "scale: expected a number, got str", dict(scale="1")),
        (ValueError, "row_scale: expected shape", dict(row_scale=torch.ones(BATCH, 4))),
        (TypeError, "out: expected None.*use subquad.sparse_attention", dict(out=Q)),
    ],
    ids=str,
)
def test_errors_of_sparse_attention(error, sentence, changes):
    given = dict(q=Q, k=K, v=K, pattern=LIST) | changes
    with pytest.raises(error, match=rf"\[sparse_attention\] {sentence}"):
        st.sparse_attention(**given)


@pytest.mark.parametrize(
    ("error", "sentence", "changes"),
    [
        (ValueError, "context: expected mix with it, got none", dict(context=Q)),
        (ValueError, "context: expected shape", dict(context=Q[:, :, :7], mix=Q[..., 0].contiguous())),
        (ValueError, "top_k: ", dict(top_k=0.5)),
        (TypeError, "top_k: expected a number, got bool", dict(top_k=True)),
        (ValueError, 'group: expected .*, got "rows"', dict(group="rows")),
        (ValueError, "group: expected .*is_causal", dict(group="head", is_causal=True)),
        (ValueError, 'budget: expected .*, got "paid"', dict(budget="paid")),
        (TypeError, "block_cap: expected an integer, got float", dict(block_cap=2.0)),
        (ValueError, "block_cap: ", dict(block_cap=0)),
        (TypeError, "key_mask: expected dtype bool", dict(key_mask=torch.ones(BATCH, SEQ))),
        (ValueError, "probs: expected shape", dict(probs=torch.ones(BATCH, 4, COLUMNS))),
        (TypeError, "is_causal: expected True or False, got int", dict(is_causal=1)),
    ],
    ids=str,
)
def test_errors_of_sea_attention(error, sentence, changes):
    given = dict(q=Q, k=Q, v=Q, probs=torch.ones(BATCH, 4, SEQ, COLUMNS)) | changes
    with pytest.raises(error, match=rf"\[sea_attention\] {sentence}"):
        st.sea_attention(**given)


def test_errors_of_the_others():
    arrays, weights = to_torch(estimate(True)[:2])
    for error, sentence, call in (
        (TypeError, r"\[expand_values\] num_keys: expected an integer, got float", lambda: st.expand_values(Q, 2.0)),
        (ValueError, r"\[expand_values\] num_keys: ", lambda: st.expand_values(Q, -1)),
        (ValueError, r"\[block_sum\] num_columns: ", lambda: st.block_sum(Q, 0)),
        (ValueError, r"\[running_mean\] num_queries: ", lambda: st.running_mean(Q, num_queries=-2)),
        (TypeError, r"\[running_mean\] state: expected a tuple of 2 arrays", lambda: st.running_mean(Q, state=(Q,))),
        (TypeError, r"\[sea_estimate\] weights: expected a mapping", lambda: st.sea_estimate(Q, Q, Q, [])),
        (
            ValueError,
            r"\[sea_estimate\] weights: expected projection among them",
            lambda: st.sea_estimate(Q, Q, Q, {}, is_causal=True),
        ),
        (
            TypeError,
            r"\[sea_estimate\] state: expected a tuple of 5 arrays, got 2",
            lambda: st.sea_estimate(**arrays, weights=weights, is_causal=True, state=(Q, Q)),
        ),
        (
            ValueError,
            r"\[sea_estimate\] return_state: expected is_causal=True",
            lambda: st.sea_estimate(Q, Q, Q, to_torch(estimate(False)[1]), return_state=True),
        ),
    ):
        with pytest.raises(error, match=sentence):
            call()


def test_plain_functions_without_a_counterpart_say_so():
    scores = torch.randn(1, 1, 4, 4, requires_grad=True)
    for call in (lambda: subquad.topk_select(scores, 2), lambda: subquad.select_blocks(scores, top_k=2)):
        with pytest.raises(RuntimeError, match=r"expected a tensor without gradient.*\.detach\(\)"):
            call()
