"""The layers of subquad.torch: formulas, seeds, masks, copies, checkpointing and compilation."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import subquad.torch as st  # noqa: E402
from subquad.torch import YosoAttention  # noqa: E402


def equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def layer(**keywords):
    torch.manual_seed(0)
    return YosoAttention(24, 4, **dict(num_hashes=4, hash_bits=3) | keywords)


def test_layer_is_the_formula():
    x = torch.randn(2, 11, 24)
    mask = torch.arange(11) < torch.tensor([[11], [7]])
    model = layer(num_kv_heads=2, head_dim=5, conv_window=3, seed=9).eval()
    heads = [p(x).unflatten(-1, (-1, 5)).transpose(1, 2) for p in (model.q_proj, model.k_proj, model.v_proj)]
    y = st.yoso_attention(*heads, key_mask=mask, query_mask=mask, num_hashes=4, hash_bits=3, seed=9)
    values = torch.nn.functional.pad((heads[2] * mask[:, None, :, None]).repeat_interleave(2, 1), (0, 0, 1, 1))
    filters = model.conv.weight[:, 0, :, 0]
    y = y + sum(filters[:, j, None, None] * values[:, :, j : j + 11] for j in range(3))
    torch.testing.assert_close(model(x, mask), model.out_proj(y.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-6)
    assert model.conv.weight.shape == (4, 1, 3, 1)


def test_layer_seeds():
    x = torch.randn(2, 11, 24)
    model = layer(seed=9).eval()
    assert torch.equal(model(x), model(x)) and not torch.equal(model(x), layer(seed=8).eval()(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    for setup in (lambda: torch.manual_seed(1), lambda: setattr(model, "generator", torch.Generator().manual_seed(1))):
        runs = []
        for _ in range(2):
            setup()
            runs.append(model(x))
        assert torch.equal(*runs)
    model = layer(expectation=True)
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), model.eval()(x))


def test_layer_masks_and_causality():
    x, mask = torch.randn(2, 11, 24), torch.arange(11) < torch.tensor([[11], [7]])
    model = layer(conv_window=5).eval()
    for changed in (x.masked_fill(~mask[..., None], 3.0), x.masked_fill(~mask[..., None], float("nan"))):
        assert torch.equal(model(x, mask)[mask], model(changed, mask)[mask])
    model = layer(is_causal=True).eval()
    changed = x.clone()
    changed[:, 6:] = float("nan")
    assert torch.equal(model(x)[:, :6], model(changed)[:, :6])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layer_under_activation_checkpointing(use_reentrant):
    model, x = layer(conv_window=3), torch.randn(2, 40, 24, requires_grad=True)

    def gradients(run):
        torch.manual_seed(5)
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(lambda: model(x))
    assert equal(gradients(lambda: checkpoint(model, x, use_reentrant=use_reentrant)), expected)
    assert not equal(expected, [p.grad.mul_(2) for p in model.parameters()])


@pytest.mark.parametrize("keywords", [{}, dict(num_kv_heads=2, conv_window=3), dict(expectation=True)])
def test_layer_copies(keywords):
    x = torch.randn(2, 11, 24)
    model = layer(seed=11, generator=torch.Generator(), **keywords).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    other = YosoAttention(24, 4, num_hashes=4, hash_bits=3, **keywords).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    learned = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "seed"}
    assert learned <= set(model.state_dict()) and ("conv.weight" in model.state_dict()) == ("conv_window" in keywords)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("keywords", [dict(num_kv_heads=2, conv_window=3), dict(is_causal=True), dict(hash_bits=5)])
def test_layer_compiles(keywords, train):
    torch._dynamo.reset()
    x, mask = torch.randn(2, 11, 24, requires_grad=True), torch.arange(11) < torch.tensor([[11], [7]])
    model = layer(**keywords).train(train)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for run in (model, compiled):
        torch.manual_seed(3)
        out = run(x, mask)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])])
    for eager, graph in zip(*runs, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


def test_layer_exports_with_any_length():
    model, x = layer(conv_window=3).eval(), torch.randn(2, 11, 24)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=4096)},))
    longer = torch.randn(2, 40, 24)
    assert torch.equal(program.module()(longer), model(longer))


def test_layer_refusals():
    for sentence, keywords in (
        ("conv_window: expected an odd number, got 4", dict(conv_window=4)),
        ("conv_window: expected None with is_causal=True", dict(conv_window=3, is_causal=True)),
        ("num_kv_heads: expected a divisor of num_heads = 4, got 3", dict(num_kv_heads=3)),
        ("num_heads: expected a value of at least 1, got 0", dict(num_heads=0)),
        ("embed_dim: expected a multiple of num_heads = 5", dict(num_heads=5)),
    ):
        with pytest.raises(ValueError, match=rf"\[YosoAttention\] {sentence}"):
            YosoAttention(24, **dict(num_heads=4) | keywords)
