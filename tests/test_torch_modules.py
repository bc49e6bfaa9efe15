"""The layers RfaAttention, LaraAttention and EvaAttention: formulas, draws, masks, states, training, compilation."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import subquad  # noqa: E402
import subquad.torch as st  # noqa: E402
from subquad.torch import EvaAttention, LaraAttention, RfaAttention  # noqa: E402

LENGTH, DIM, SIDE = 12, 24, (3, 4)
POOLS = ("pool", "pool-mixed", "pool-vmixed", "no-param-pool", "no-param-pool-mixed", "no-param-pool-vmixed")
LAYERS = {
    "rfa": (RfaAttention, dict(num_features=6)),
    "rfa_gated": (RfaAttention, dict(num_features=6, is_causal=True, gated=True, num_kv_heads=2)),
    "rfa_fixed": (RfaAttention, dict(num_features=6, projection="fixed", features="hyperbolic", orthogonal=False)),
    "rfa_learned": (RfaAttention, dict(num_features=6, projection="learned", features="relu", num_kv_heads=2)),
    "rfa_elu": (RfaAttention, dict(features="elu", head_dim=5)),
    "lara": (LaraAttention, dict(num_landmarks=4)),
    "lara_adaptive": (LaraAttention, dict(num_landmarks=4, proposal="adaptive-1d", num_kv_heads=2, mis="bh")),
    "lara_pool": (LaraAttention, dict(num_landmarks=4, proposal="pool-vmixed", samples_per_landmark=2)),
    "lara_dense": (LaraAttention, dict(num_landmarks=5, proposal="pool", pool_module="dense", num_kv_heads=2)),
    "eva": (EvaAttention, dict(window=4, chunk_size=2)),
    "eva_grouped": (EvaAttention, dict(window=4, chunk_size=2, num_kv_heads=2, adaptive_proj="no-ln", is_causal=True)),
    "eva_none": (EvaAttention, dict(window=4, chunk_size=4, adaptive_proj="none", partition=False)),
    "eva_plain": (EvaAttention, dict(window=2, chunk_size=4, adaptive_proj=None, is_causal=True)),
}
each = pytest.mark.parametrize("name", LAYERS)


def layer(name, **keywords):
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    return kind(DIM, 4, **options | keywords)


def inputs(name, batch=2):
    """Tokens and a mask, of images for pools."""
    torch.manual_seed(1)
    shape = SIDE if "pool" in name or "dense" in name else (LENGTH,)
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])[:batch]).reshape(batch, *shape)
    return torch.randn(batch, *shape, DIM), mask


def heads(model, x):
    return [
        p(x).unflatten(-1, (-1, model.head_dim)).transpose(1, 2) for p in (model.q_proj, model.k_proj, model.v_proj)
    ]


def merged(model, y, mask=None):
    y = y if mask is None else y * mask[:, None, :, None]
    return model.out_proj(y.transpose(1, 2).flatten(2))


def same(x, y):
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# Formulas


def test_rfa_is_the_formula():
    x, mask = inputs("rfa")
    model = layer("rfa", seed=9, num_kv_heads=2).eval()
    y = st.rfa_attention(*heads(model, x), num_features=6, key_mask=mask, seed=9)
    same(model(x, mask), merged(model, y, mask))
    model = layer("rfa_gated").eval()
    gate = model.gate_proj(x).sigmoid().transpose(1, 2)
    y = st.rfa_attention(*heads(model, x), num_features=6, gate=gate.contiguous(), is_causal=True)
    same(model(x), merged(model, y))
    assert model.gate_proj.weight.shape == (2, DIM)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_rfa_begins_with_the_rows_of_its_seed(orthogonal):
    x, _ = inputs("rfa")
    options = dict(seed=5, orthogonal=orthogonal, num_kv_heads=2)
    drawn = layer("rfa", **options).eval()
    for projection in ("fixed", "learned"):
        model = layer("rfa", projection=projection, **options)
        assert model.projection.shape == (2, 6, 6)
        same(model.eval()(x), drawn(x))
        assert torch.equal(model.train()(x), model.eval()(x))
        assert isinstance(model.projection, torch.nn.Parameter) == (projection == "learned")


def segments(x, count):
    lengths = [LENGTH // count + (i >= count - LENGTH % count) for i in range(count)]
    return torch.stack([part.mean(2) for part in x.split(lengths, 2)], 2)


def test_lara_is_the_formula():
    x, _ = inputs("lara")
    for proposal in ("segment", "adaptive-1d"):
        model = layer("lara", proposal=proposal, num_landmarks=5, alpha_coeff=2.0, t_norm="landmark").eval()
        q, k, v = heads(model, x)
        mapped = (model.q_bar_gen(q), model.k_bar_gen(k)) if proposal == "adaptive-1d" else (q, k)
        landmarks = tuple(segments(y, 5).contiguous() for y in mapped)
        y = st.lara_attention(q, k, v, landmarks=landmarks, alpha_coeff=2.0, t_norm="landmark")
        same(model(x), merged(model, y))


@pytest.mark.parametrize("pool_module", ["light", "dense"])
@pytest.mark.parametrize("proposal", POOLS)
def test_lara_of_images_is_the_formula(proposal, pool_module):
    x, _ = inputs("lara_pool")
    model = layer("lara", proposal=proposal, pool_module=pool_module, num_landmarks=5).eval()
    q, k, v = heads(model, x.flatten(1, 2))
    # 3 rows in two bins, which share the middle one, and 4 columns in two bins
    bins = [[r * 4 + c for r in rows for c in columns] for rows in ((0, 1), (1, 2)) for columns in ((0, 1), (2, 3))]
    q_bar, k_bar, v_bar = (torch.stack([y[:, :, b].mean(2) for b in bins], 2) for y in (q, k, v))
    if model.q_bar_gen is not None:
        if pool_module == "dense":
            q_bar, k_bar = (y.transpose(1, 2).flatten(2) for y in (q_bar, k_bar))
        q_bar, k_bar = model.q_bar_gen(q_bar), model.k_bar_gen(k_bar)
        if pool_module == "dense":
            q_bar, k_bar = (y.unflatten(-1, (4, 6)).transpose(1, 2) for y in (q_bar, k_bar))
    if "mixed" in proposal:
        logits = 6**-0.5 * k_bar @ k_bar.mT
        logits = logits + ((v_bar.square().sum(-1).sqrt() + 1e-4).log()[:, :, None] if "vmixed" in proposal else 0)
        k_bar = logits.softmax(-1) @ k_bar
    y = st.lara_attention(q, k, v, landmarks=(q_bar.contiguous(), k_bar.contiguous()))
    same(model(x), merged(model, y).unflatten(1, SIDE))


@pytest.mark.parametrize("is_causal", [False, True])
def test_eva_is_the_formula(is_causal):
    x, _ = inputs("eva")
    model = layer("eva", num_kv_heads=2, is_causal=is_causal).eval()
    q, k, v = heads(model, x)
    q_mean, k_mean = (y.unflatten(2, (-1, 2)).mean(3) for y in (q, k))
    k_bar = model.adaptive_mu_k(k_mean)
    q_bar = model.adaptive_mu_q((q_mean[:, 0::2] + q_mean[:, 1::2]) / 2)
    mu = (q_bar + k_bar) * (1.0 if is_causal else 0.5)
    y = st.eva_attention(q, k, v, window=4, chunk_size=2, landmarks=(k_bar, mu), is_causal=is_causal)
    same(model(x), merged(model, y))
    model = layer("eva", adaptive_proj=None).eval()
    same(model(x), merged(model, st.eva_attention(*heads(model, x), window=4, chunk_size=2)))
    model = layer("eva", adaptive_proj="none").eval()
    q, k, v = heads(model, x)
    k_bar = model.adaptive_mu_k(k.unflatten(2, (-1, 2)).mean(3))
    y = st.eva_attention(q, k, v, window=4, chunk_size=2, landmarks=(k_bar, torch.zeros_like(k_bar)))
    same(model(x), merged(model, y))


# Draws, masks, causality


@each
def test_evaluation_repeats_and_training_draws(name):
    x, _ = inputs(name)
    model = layer(name)
    draws = not any(word in name for word in ("fixed", "learned", "elu"))
    assert torch.equal(model(x), model(x)) != draws
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    for setup in (lambda: torch.manual_seed(1), lambda: setattr(model, "generator", torch.Generator().manual_seed(1))):
        runs = []
        for _ in range(2):
            setup()
            runs.append(model(x))
        assert torch.equal(*runs)


@each
def test_masked_tokens_are_not_seen(name):
    x, mask = inputs(name)
    model = layer(name).eval()
    for value in (3.0, float("nan")):
        changed = x.masked_fill(~mask[..., None], value)
        assert torch.equal(model(x, mask), model(changed, mask))
    out = model(x, mask)
    assert torch.equal(out[~mask], model.out_proj.bias.expand_as(out[~mask]))
    assert torch.equal(out[mask], model(x)[mask]) == getattr(model, "is_causal", False)


@pytest.mark.parametrize("name", ["rfa", "lara", "lara_adaptive", "eva", "eva_grouped"])
def test_padding_changes_nothing(name):
    x, mask = inputs(name)
    model = layer(name).eval()
    same(model(x, mask)[1, :7], model(x[1:, :7])[0])


@pytest.mark.parametrize("name", [name for name, (_, options) in LAYERS.items() if "is_causal" in options])
def test_causal_layers_do_not_look_ahead(name):
    x, _ = inputs(name)
    model = layer(name).eval()
    changed = x.clone()
    changed[:, 7:] = 9.0 if model.__class__ is RfaAttention else float("nan")  # a gate of NaN is refused
    assert torch.equal(model(x)[:, :7], model(changed)[:, :7])


# Training and states


@each
def test_training_reduces_a_loss(name):
    x, mask = inputs(name)
    model = layer(name)
    target = 1 + 2 * x.flatten(1, -2).mean(1).reshape(2, *[1] * (x.ndim - 2), DIM).expand_as(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x, mask) - target)[mask].square().mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0], losses


@each
def test_copies(name):
    x, mask = inputs(name)
    model = layer(name, generator=torch.Generator()).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, mask), model(x, mask))
    kind, options = LAYERS[name]
    other = kind(DIM, 4, **options).eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, mask), model(x, mask))


def test_states_have_the_shapes_of_the_published_modules():
    def shapes(model):
        base = ("q_proj", "k_proj", "v_proj", "out_proj")
        return {n: tuple(p.shape) for n, p in model.state_dict().items() if n.split(".")[0] not in base}

    def maps(names, dim):
        linear = {f"{n}.0.{p}": (dim, dim)[: 2 - (p == "bias")] for n in names for p in ("weight", "bias")}
        return linear | {f"{n}.1.{p}": (dim,) for n in names for p in ("weight", "bias")}

    bars, mus = ("q_bar_gen", "k_bar_gen"), ("adaptive_mu_q", "adaptive_mu_k")
    assert shapes(layer("lara")) == shapes(layer("lara", proposal="no-param-pool-mixed")) == {}
    assert shapes(layer("lara", proposal="adaptive-1d")) == shapes(layer("lara", proposal="pool")) == maps(bars, 6)
    assert shapes(layer("lara", proposal="pool", pool_module="dense")) == maps(bars, 24)
    assert shapes(layer("eva")) == maps(mus, 6) and shapes(layer("eva_none")) == maps(mus[1:], 6)
    assert shapes(layer("eva", adaptive_proj="no-ln")) == {n: s for n, s in maps(mus, 6).items() if ".0." in n}
    assert shapes(layer("eva", adaptive_proj=None)) == {}
    rows = {"projection": (4, 6, 6), "seed": ()}
    assert shapes(layer("rfa_fixed")) == shapes(layer("rfa", projection="learned")) == rows
    assert shapes(layer("rfa")) == shapes(layer("rfa_elu")) == {"seed": ()}
    assert shapes(layer("rfa_gated")) == {"seed": (), "gate_proj.weight": (2, 24), "gate_proj.bias": (2,)}
    for name in ("lara_adaptive", "eva"):
        weights = [p for n, p in layer(name).named_parameters() if n.endswith("0.weight")]
        assert weights and all(0.01 < p.std() < 0.03 and p.abs().max() < 0.1 for p in weights)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["rfa", "lara_pool", "eva"])
def test_activation_checkpointing(name, use_reentrant):
    x, _ = inputs(name)
    x.requires_grad_()
    model = layer(name)

    def gradients(run):
        torch.manual_seed(5)
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(lambda: model(x))
    for one, other in zip(gradients(lambda: checkpoint(model, x, use_reentrant=use_reentrant)), expected, strict=True):
        assert torch.equal(one, other)


# Compilation and dtypes


@each
def test_layers_compile(name):
    torch._dynamo.reset()
    x, mask = inputs(name)
    x.requires_grad_()
    model = layer(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for run in (model, compiled):
        torch.manual_seed(3)
        out = run(x, mask)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])])
    for eager, graph in zip(*runs, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rfa", "lara", "lara_adaptive", "eva", "eva_grouped"])
def test_layers_export_with_any_length(name):
    model, (x, _) = layer(name).eval(), inputs(name)
    length = torch.export.Dim("length", min=8, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    longer = torch.randn(2, 40, DIM)
    assert torch.equal(program.module()(longer), model(longer))


@each
def test_16_bits_and_autocast(name):
    x, mask = inputs(name)
    model = layer(name).eval()
    expected = model(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, mask)
    out.float().sum().backward()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    low, truth = rounded(x.bfloat16(), mask), copy.deepcopy(rounded).float()(x.bfloat16().float(), mask)
    for y, wide in ((out, expected), (low, truth)):
        assert y.dtype == torch.bfloat16
        assert (y.float() - wide)[mask].abs().max() < 0.05


def test_refusals():
    for name, sentence, keywords in (
        ("rfa", 'features: expected "positive", .* or "elu", got \'fast\'', dict(features="fast")),
        ("rfa", 'projection: expected "drawn", "fixed" or "learned"', dict(projection="new")),
        ("rfa", "gated: expected False without is_causal", dict(gated=True)),
        ("rfa", "num_features: expected a value of at least 1, got 0", dict(num_features=0)),
        ("rfa", "num_kv_heads: expected a divisor of num_heads = 4, got 3", dict(num_kv_heads=3)),
        ("lara", 'proposal: expected "segment", ', dict(proposal="mean")),
        ("lara", 'pool_module: expected "light" with "segment"', dict(pool_module="dense")),
        ("lara", "num_landmarks: expected a value of at least 1, got 0", dict(num_landmarks=0)),
        ("eva", 'adaptive_proj: expected "default", "no-ln", "none" or None', dict(adaptive_proj="qk")),
        ("eva", "chunk_size: expected a divisor or multiple of window = 4, got 3", dict(chunk_size=3)),
        ("eva", "window: expected a value of at least 1, got 0", dict(window=0)),
    ):
        kind = LAYERS[name][0].__name__
        with pytest.raises(ValueError, match=rf"\[{kind}\] {sentence}"):
            layer(name, **keywords)
    with pytest.raises(ValueError, match=r"\[LaraAttention\] x: expected shape \[B, height, width, embed_dim\]"):
        layer("lara_pool")(torch.randn(2, LENGTH, DIM))
    assert "num_features=6" in repr(layer("rfa")) and subquad.__version__
