"""YosoAttention against transformers' YosoSelfAttention: equal where the two mean the same, different on purpose."""

import numpy as np
import pytest

from tolerance import assert_budget

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
modeling = pytest.importorskip("transformers.models.yoso.modeling_yoso", reason="transformers has no YOSO")

from transformers import YosoConfig  # noqa: E402

from subquad.torch import YosoAttention  # noqa: E402

WIDTH, HEADS, BITS = 48, 3, 9


def theirs(conv_window):
    torch.manual_seed(0)
    config = YosoConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, hash_code_len=BITS, use_expectation=True, conv_window=conv_window
    )
    return modeling.YosoSelfAttention(config).eval()


def ours(module, conv_window, grad):
    """Our layer with the weights of theirs, which ends before the output projection."""
    layer = YosoAttention(WIDTH, HEADS, hash_bits=BITS, expectation=True, grad=grad, conv_window=conv_window)
    layer.out_proj = torch.nn.Identity()
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"} | ({"conv": "conv"} if conv_window else {})
    for name, source in names.items():
        getattr(layer, name).load_state_dict(getattr(module, source).state_dict())
    return layer.eval()


def run(module, x, dout, *arguments):
    """The result and the gradients for the input and all weights, by name of the weight's role."""
    x = x.detach().clone().requires_grad_()
    out = module(x, *arguments)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(dout)
    roles = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    gradients = {}
    for name, weight in module.named_parameters():
        layer, _, kind = name.partition(".")
        gradients[f"{roles.get(layer, layer)}.{kind}"] = weight.grad
    return {"out": out, "x": x.grad, **gradients}


@pytest.mark.parametrize("conv_window", [None, 5])
@pytest.mark.parametrize("length", [1, 37, 128])
def test_unpadded_results_and_lower_bound_gradients_agree(conv_window, length):
    """The error against theirs in float64 is within twice that of theirs in float32."""
    x, dout = torch.randn(2, 2, length, WIDTH, generator=torch.Generator().manual_seed(1))
    keep = torch.ones(2, length)
    module = theirs(conv_window)
    single = run(module, x, dout, keep)
    layer = run(ours(module, conv_window, "lower_bound"), x, dout)
    module.zero_grad()
    double = run(module.double(), x.double(), dout.double(), keep.double())
    assert set(layer) == set(double)
    for name, exact in double.items():
        exact = exact.detach().numpy()
        # sums over all tokens and heads, whose order is free
        floor = 4e-6 * float(np.abs(exact).max())
        assert_budget(layer[name].detach().numpy(), exact, single[name].detach().numpy(), floor=floor, what=name)


def test_the_default_gradient_is_the_true_one():
    """Theirs is a lower bound of it, so that the two point the same way but differ."""
    x, dout = torch.randn(2, 2, 37, WIDTH, generator=torch.Generator().manual_seed(1))
    module = theirs(None)
    bound = run(module, x, dout, torch.ones(2, 37))["q_proj.weight"].flatten()
    exact = run(ours(module, None, None), x, dout)["q_proj.weight"].flatten()
    assert torch.nn.functional.cosine_similarity(bound, exact, dim=0) > 0.95
    assert exact.norm() > 1.05 * bound.norm()


def test_padding_is_honoured_here():
    x = torch.randn(2, 37, WIDTH, generator=torch.Generator().manual_seed(1))
    keep = torch.arange(37) < torch.tensor([[37], [20]])
    layer = ours(theirs(None), None, None)
    with torch.no_grad():
        padded, other = layer(x, keep), layer(torch.where(keep[..., None], x, 2 * x + 1), keep)
        assert torch.equal(padded[keep], other[keep])
        torch.testing.assert_close(padded[1, :20], layer(x[1:, :20])[0], rtol=1e-5, atol=1e-6)
        assert not torch.equal(padded[keep], layer(x)[keep])


def test_equal_queries_and_keys_are_finite_here():
    x, dout = torch.randn(2, 2, 64, WIDTH, generator=torch.Generator().manual_seed(1))
    module = theirs(None)
    module.key.load_state_dict(module.query.state_dict())
    for grad in ("exact", "lower_bound"):
        assert all(torch.isfinite(result).all() for result in run(ours(module, None, grad), x, dout).values())
