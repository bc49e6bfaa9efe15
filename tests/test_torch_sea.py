"""SeaAttention: the estimator against the reference, both of its paths, masks, states, draws, training, compilation."""

import copy
import pickle
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import subquad  # noqa: E402
import subquad.torch as st  # noqa: E402
from ref.sea_estimate import sea_estimate as reference  # noqa: E402
from subquad.torch import SeaAttention  # noqa: E402
from subquad.torch.nn import _sea_parts as parts  # noqa: E402
from subquad.torch.nn.sea_estimator import SeaEstimator  # noqa: E402

LENGTH, DIM, HEADS = 13, 24, 3
SETTINGS = {
    True: dict(is_causal=True, num_columns=12, top_k=4, num_features=5, max_positions=32),
    False: dict(is_causal=False, num_columns=10, top_k=4, num_features=7),
}
both = pytest.mark.parametrize("is_causal", [True, False])


def layer(is_causal, **keywords):
    torch.manual_seed(0)
    return SeaAttention(DIM, HEADS, **SETTINGS[is_causal] | keywords)


def tokens(length=LENGTH, batch=3):
    torch.manual_seed(1)
    return torch.randn(batch, length, DIM)


def masks(length=LENGTH):
    """Holes, padding on the left and on the right, and an item without tokens."""
    rows = torch.arange(length)
    return torch.stack([rows % 3 != 1, rows >= 4, rows < 7, rows < 0])


def heads(model, x):
    return [p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (model.q_proj, model.k_proj, model.v_proj)]


def same(x, y, tolerance=1e-5):
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture
def wide(monkeypatch):
    """Prefix sums in float64, which the core does not have, so that the estimator can be compared in it."""
    monkeypatch.setattr(parts, "linear_attention", lambda fq, fk, v, **_: (fq @ fk.transpose(-1, -2)).tril() @ v)


# The estimator


def estimator_inputs(length, dtype=torch.float32):
    torch.manual_seed(length)
    return [torch.randn(4, HEADS, length, 8, dtype=dtype) for _ in range(3)]


@both
@pytest.mark.parametrize("length", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimator_matches_reference(is_causal, length, dtype, request):
    if dtype == torch.float64:
        request.getfixturevalue("wide")
    estimator = layer(is_causal).estimator.to(dtype)
    weights = {name: x.detach().numpy() for name, x in estimator._parts().items()}
    inputs = estimator_inputs(length, dtype)
    for mask in (None, masks(length)):
        found = estimator(*inputs, mask)
        arrays = [x.numpy() for x in inputs]
        expected = reference(*arrays, weights, is_causal=is_causal, key_mask=None if mask is None else mask.numpy())
        for x, y in zip(found[1:], expected, strict=True):
            assert x.dtype == dtype
            np.testing.assert_allclose(x.detach(), y, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13)
        same(found.probs[found.probs.sum(-1) > 0], found.scores.softmax(-1)[found.probs.sum(-1) > 0])


@both
@pytest.mark.parametrize("length", [0, 1, 12, 13])
def test_estimator_gives_what_the_core_gives(is_causal, length):
    estimator = layer(is_causal).estimator
    inputs = estimator_inputs(length)
    for mask in (None, masks(length)):
        found = estimator(*inputs, mask)
        expected = subquad.sea_estimate(*inputs, estimator.weights(), is_causal=is_causal, key_mask=mask)
        for x, y in zip(found[1:], expected, strict=True):
            same(x.detach(), y)


@both
def test_gradients_of_the_estimator_are_those_in_float64(is_causal, request):
    estimator, mask = layer(is_causal).estimator, masks()

    def gradients(dtype):
        model = copy.deepcopy(estimator).to(dtype)
        inputs = [x.to(dtype).requires_grad_() for x in estimator_inputs(LENGTH)]
        torch.manual_seed(9)
        found = model(*inputs, mask)
        loss = sum((x * torch.randn(x.shape).to(dtype)).sum() for x in (found.probs, found.row_scale, found.mix))
        learned = dict(zip("qkv", inputs, strict=True)) | dict(model.named_parameters())
        return dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))

    narrow = gradients(torch.float32)
    request.getfixturevalue("wide")
    exact = gradients(torch.float64)
    # a number for all columns, which LayerNorm and softmax take out: its gradient is rounding
    assert float(exact.pop("out_bias").abs().max()) < 1e-11
    for name, y in exact.items():
        assert float((narrow[name] - y).abs().max()) <= 1e-5 * float(y.abs().max()), name


def test_published_sizes():
    shapes = {n: tuple(x.shape) for n, x in SeaAttention(768, 12, is_causal=True).estimator.weights().items()}
    assert shapes == {
        "projection": (33, 64), "position": (2048, 64), "encoder_weight": (128, 192), "encoder_bias": (128,),
        "encoder_norm_weight": (128,), "encoder_norm_bias": (128,), "scaler_weight": (2, 128), "scaler_bias": (2,),
        "row_weight": (32, 128), "row_bias": (32,), "row_norm_weight": (16,), "row_norm_bias": (16,),
        "conv1_weight": (24, 24, 3, 3), "conv1_bias": (24,), "conv2_weight": (24, 24, 3, 3), "conv2_bias": (24,),
        "out_weight": (12, 24), "out_bias": (12,), "norm_weight": (64,), "norm_bias": (64,),
    }  # fmt: skip
    model = SeaAttention(768, 12)
    shapes = {n: tuple(x.shape) for n, x in model.estimator.weights().items()}
    assert shapes == {
        "projection": (266, 64), "encoder_weight": (128, 192), "encoder_bias": (128,), "encoder_norm_weight": (128,),
        "encoder_norm_bias": (128,), "scaler_weight": (2, 128), "scaler_bias": (2,), "row_weight": (256, 128),
        "row_bias": (256,), "conv1_weight": (48, 48, 3, 3), "conv1_bias": (48,), "conv2_weight": (48, 48, 3, 3),
        "conv2_bias": (48,), "out_weight": (12, 48, 3, 3), "out_bias": (12,),
    }  # fmt: skip
    assert (model.top_k, SeaAttention(64, 4, is_causal=True).top_k) == (7, 64)
    state = {n.removeprefix("estimator.") for n in model.state_dict() if n.startswith("estimator.")}
    assert state == {*shapes, "seed"}


# The layer


@both
def test_layer_is_the_formula(is_causal):
    x, mask = tokens(batch=4), masks()
    model = layer(is_causal, group="query", budget="paper", block_cap=2, head_dim=5).eval()
    q, k, v = heads(model, x)
    for key_mask in (None, mask):
        probs, row_scale, mix = model.estimator(q, k, v, key_mask)[1:]
        out = st.sea_attention(
            q, k, v, probs, row_scale=row_scale, mix=mix, key_mask=key_mask, query_mask=key_mask, is_causal=is_causal,
            top_k=4, group="query", budget="paper", block_cap=2,
        )  # fmt: skip
        same(model(x, key_mask), model.out_proj(out.transpose(1, 2).flatten(2)))


@both
def test_with_and_without_gradients_alike(is_causal):
    """The core and torch round differently, so that a choice between equal probabilities could differ; here none is."""
    x, mask = tokens(batch=4), masks()
    model = layer(is_causal)
    for key_mask in (None, mask):
        trained = model.train()(x, key_mask)
        assert trained.requires_grad
        with torch.no_grad():
            same(model.eval()(x, key_mask), trained)
        same(model(x, key_mask), trained)


@both
def test_an_item_alone_is_the_item_in_a_batch(is_causal):
    x, mask = tokens(batch=4), masks()
    for train in (True, False):
        model = layer(is_causal).train(train)
        with torch.set_grad_enabled(train):
            together = model(x, mask)
            for item, kept, out in zip(x, mask, together, strict=True):
                same(out[kept], model(item[kept][None])[0])


@both
def test_masked_tokens_are_not_seen(is_causal):
    x, mask = tokens(batch=4), masks()
    model = layer(is_causal)
    changed = x.masked_fill(~mask[..., None], float("nan"))
    for train in (True, False):
        out = model.train(train)(x, mask)
        assert torch.equal(model(changed, mask), out)
        assert torch.equal(out[~mask], model.out_proj.bias.expand_as(out[~mask]))
    model(changed, mask).square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_causal_layers_do_not_look_ahead(train):
    x = tokens()
    model = layer(True).train(train)
    changed = x.clone()
    changed[:, 7:] = float("nan")
    with torch.set_grad_enabled(train):
        assert torch.equal(model(x)[:, :7], model(changed)[:, :7])


def test_keys_without_limit_are_dense_attention():
    x = tokens()
    model = layer(True, top_k=LENGTH * 4, num_columns=64).eval()
    with torch.no_grad():
        q, k, v = heads(model, x)
        row_scale, mix = (y[..., None] for y in model.estimator(q, k, v)[2:])
        mean = v.cumsum(2) / torch.arange(1, LENGTH + 1)[:, None]
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = mix * row_scale * exact + (1 - mix) * mean
        same(model(x), model.out_proj(out.transpose(1, 2).flatten(2)))


# States


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [5, 8], [1, 0, 4, 7, 1], [LENGTH]])
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_continues(sizes, masked):
    x, mask = tokens(batch=4), masks() if masked else None
    model = layer(True).eval()
    expected, state, outs = model(x, mask), None, []
    for piece, kept in zip(
        x.split(sizes, 1), [None] * len(sizes) if mask is None else mask.split(sizes, 1), strict=True
    ):
        out, state = model(piece, kept, state=state, return_state=True)
        outs.append(out)
    same(torch.cat(outs, 1), expected)
    assert state.length == LENGTH and state.tokens[0].shape == (4, HEADS, LENGTH, 8)


@torch.no_grad()
def test_a_mask_may_come_later():
    x, mask = tokens(batch=4), masks()
    mask[:, :5] = True
    model = layer(True).eval()
    first, state = model(x[:, :5], return_state=True)
    second = model(x[:, 5:], mask[:, 5:], state=state)
    same(torch.cat([first, second], 1), model(x, mask))


@torch.no_grad()
def test_states_stay_as_they_are():
    x = tokens()
    model = layer(True).eval()
    _, state = model(x[:, :6], return_state=True)
    runs = [model(y, state=state) for y in (x[:, 6:], -x[:, 6:], x[:, 6:])]
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])
    left, _ = model(x[:, 6:9], state=state, return_state=True), model(-x[:, 6:], state=state, return_state=True)
    same(torch.cat([left[0], model(x[:, 9:], state=left[1])], 1), runs[0])


# Draws


def steps(model, count, passes=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rows = []
    for _ in range(count):
        for _ in range(passes):
            model(tokens()).square().mean().backward()
        rows.append(model.estimator.projection.clone())
        optimizer.step()
    return rows


@both
def test_the_projection_is_drawn_again(is_causal):
    model = layer(is_causal, redraw_interval=2, seed=5)
    rows = steps(model, 5, passes=2)
    changes = [not torch.equal(a, b) for a, b in zip(rows, rows[1:], strict=False)]
    assert changes == [False, True, False, True] and int(model.estimator.seed) == 7
    assert torch.equal(model.estimator.projection, layer(is_causal, seed=7).estimator.projection)
    fixed = steps(layer(is_causal, redraw_interval=None), 3)
    assert torch.equal(fixed[0], fixed[-1])
    model.eval()
    before = model.estimator.projection.clone()
    for p in model.parameters():
        p.data.mul_(1.1)
        model(tokens())
    assert torch.equal(model.estimator.projection, before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x, grads = tokens().requires_grad_(), []
    for run in (lambda m: m(x), lambda m: checkpoint(m, x, use_reentrant=use_reentrant)):
        model = layer(True, redraw_interval=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            run(model).square().sum().backward()
            optimizer.step()
        assert int(model.estimator.seed) == 2
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


# Copies, compilation, dtypes, refusals


@both
def test_copies(is_causal):
    x, mask = tokens(batch=4), masks()
    model = layer(is_causal, seed=3).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, mask), model(x, mask))
    other = SeaAttention(DIM, HEADS, **SETTINGS[is_causal]).eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, mask), model(x, mask))


@both
@pytest.mark.parametrize("train", [False, True])
def test_layer_compiles(is_causal, train):
    torch._dynamo.reset()
    x, mask = tokens(batch=4).requires_grad_(), masks()
    model = layer(is_causal).train(train)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    learned = [x, *model.parameters()]
    runs = []
    for run in (model, compiled):
        out = run(x, mask)
        runs.append([out, *torch.autograd.grad(out.square().sum(), learned, allow_unused=True)])
    for eager, graph in zip(*runs, strict=True):
        assert (eager is None) == (graph is None)
        if eager is not None:
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("grad", [False, True])
def test_layer_exports_with_any_length(is_causal, grad):
    model, lengths = layer(is_causal).eval(), torch.export.Dim("length", min=8, max=32)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (tokens(),), dynamic_shapes=({1: lengths},))
        for length in (26, 31):
            assert torch.equal(program.module()(tokens(length)), model(tokens(length)))


@both
def test_16_bits_and_autocast(is_causal):
    x = tokens()
    model = layer(is_causal, top_k=64).eval()  # all keys: rounding decides nothing
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    low, truth = rounded(x.bfloat16()), copy.deepcopy(rounded).float()(x.bfloat16().float())
    with torch.no_grad():
        core = rounded(x.bfloat16())
    for y, exact in ((out, expected), (low, truth), (core, truth)):
        assert y.dtype == torch.bfloat16
        assert (y.float() - exact).abs().max() < 0.05


def test_refusals():
    for sentence, keywords in (
        ("num_columns: expected a multiple of 4 in [4, 4096], got 6", dict(is_causal=True, num_columns=6)),
        ("num_columns: expected a multiple of 2 in [4, 4096], got 2", dict(is_causal=False, num_columns=2)),
        ("num_features: expected a value in [1, 4096], got 0", dict(is_causal=True, num_features=0)),
        ("max_positions: expected a value of at least 1, got 0", dict(is_causal=True, max_positions=0)),
        ("redraw_interval: expected None or at least 1, got 0", dict(is_causal=True, redraw_interval=0)),
        ("top_k: expected a value of at least 1, got 0.5", dict(is_causal=True, top_k=0.5)),
        ('group: expected "query" or "row_heads", got \'head\'', dict(is_causal=True, group="head")),
        ('budget: expected "code" or "paper", got \'all\'', dict(is_causal=False, budget="all")),
        ("block_cap: expected None or at least 1, got 0", dict(is_causal=False, block_cap=0)),
    ):
        with pytest.raises(ValueError, match=re.escape(f"[SeaAttention] {sentence}")):
            layer(**keywords)
    x = tokens(40)
    for train in (True, False):
        with pytest.raises(ValueError, match="position|at most max_positions = 32 tokens, got 40"), torch.no_grad():
            layer(True).train(train)(x)
    mask = torch.arange(40).expand(3, -1) < 32
    assert layer(True)(x, mask).shape == x.shape
    with pytest.raises(ValueError, match=r"\[SeaAttention\] return_state: expected is_causal=True"), torch.no_grad():
        layer(False)(x, return_state=True)
    with pytest.raises(TypeError, match=r"\[SeaAttention\] state: expected None or a SeaState, got tuple"):
        layer(True)(tokens(), state=(1, 2))
    with pytest.raises(RuntimeError, match=r"\[SeaAttention\] state: expected a call under torch.no_grad"):
        layer(True)(tokens(), return_state=True)
    with pytest.raises(ValueError, match="return_parts: expected False with a state"), torch.no_grad():
        layer(True)(tokens(), return_state=True, return_parts=True)
    assert "top_k=4" in repr(layer(True)) and "num_columns=12" in repr(layer(True))
    assert SeaEstimator(2, 8).num_features == 16 and SeaEstimator(2, 4, is_causal=True).num_features == 1
