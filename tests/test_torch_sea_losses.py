"""The losses of SEA: against the dense formulas, their gradients, masks, memory, what they train."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import subquad  # noqa: E402
import subquad.torch as st  # noqa: E402
from subquad.torch import SeaAttention, sea_losses  # noqa: E402
from subquad.torch.nn.sea import SeaParts  # noqa: E402

BATCH, HEADS, DIM = 4, 2, 8
both = pytest.mark.parametrize("is_causal", [True, False])


def masks(length):
    """No mask for an item; holes; padding on the right; no token at all."""
    rows = torch.arange(length)
    return torch.stack([rows >= 0, rows % 3 != 1, rows < max(length // 2, 1), rows < 0])


def visible(length, mask, is_causal):
    seen = torch.ones(1, length, length, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    return seen[:, None] if mask is None else (seen & mask[:, None, :] & mask[:, :, None])[:, None]


def log_rows(x, seen):
    """log softmax over the keys that a row sees, 0 for the others."""
    none = ~seen.any(-1, keepdim=True)
    return x.masked_fill(~(seen | none), float("-inf")).log_softmax(-1).masked_fill(~seen, 0)


def dense_columns(seen, columns):
    """The column of every key, by the definition: the column whose centre is nearest."""
    rank, count = seen.cumsum(-1) - 1, seen.sum(-1, keepdim=True)
    return (((2 * rank + 1) * columns - 1).div(2 * count.clamp(min=1), rounding_mode="floor")).clamp(0, columns - 1)


def divergence(log_p, log_q, seen):
    p, q = log_p.exp() * seen, log_q.exp() * seen
    return (p * (log_p - log_q)).sum(-1), (p - q).square().sum(-1)


def dense_estimate(scores, seen):
    """log Q of the scores, spread over all keys: an N x N array."""
    columns = dense_columns(seen, scores.shape[-1]).expand(*scores.shape[:2], -1, -1)
    return log_rows(scores.gather(-1, columns), seen)


def blocks(log_p, seen, columns):
    """teacher_blocks in the dtype of log_p."""
    p = log_p.exp() * seen
    index = dense_columns(seen, columns).expand_as(p)
    masses = p.new_zeros(*p.shape[:3], columns).scatter_add(-1, index, p)
    return masses, p.square().sum(-1), (p * log_p).sum(-1)


def case(length, columns, masked, is_causal):
    torch.manual_seed(length)
    mask = masks(length) if masked else None
    seen = visible(length, mask, is_causal)
    log_p = log_rows(2 * torch.randn(BATCH, HEADS, length, length, dtype=torch.float64), seen)
    scores = 2 * torch.randn(BATCH, HEADS, length, columns, dtype=torch.float64)
    return scores.requires_grad_(), log_p, seen, {"key_mask": mask, "query_mask": mask, "is_causal": is_causal}


@both
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "columns"), [(1, 4), (7, 12), (12, 12), (33, 12), (40, 5)])
def test_estimator_divergence_is_the_dense_formula(length, columns, masked, is_causal):
    scores, log_p, seen, keywords = case(length, columns, masked, is_causal)
    expected = divergence(log_p, dense_estimate(scores, seen), seen)
    found = sea_losses.estimator_divergence(scores, *blocks(log_p, seen, columns), **keywords)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        weights = torch.randn(x.shape, dtype=x.dtype)
        dx, dy = (torch.autograd.grad(z, scores, weights, retain_graph=True)[0] for z in (x, y))
        torch.testing.assert_close(dx, dy, rtol=1e-9, atol=1e-12)
        assert not x[~seen.any(-1).expand_as(x)].any()


@both
def test_what_no_row_sees_takes_no_part(is_causal):
    scores, log_p, seen, keywords = case(7, 12, True, is_causal)
    arrays = blocks(log_p, seen, 12)
    widths = (
        arrays[0]
        .new_zeros(arrays[0].shape)
        .scatter_add(-1, dense_columns(seen, 12).expand_as(log_p), seen.expand_as(log_p).double())
    )
    changed = scores.detach().masked_fill(widths == 0, float("nan")).requires_grad_()
    results = []
    for x in (scores, changed):
        kl, sse = sea_losses.estimator_divergence(x, *arrays, **keywords)
        results.append((kl, sse, *torch.autograd.grad((kl + sse).sum(), x)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def layer_case(length, masked, is_causal):
    torch.manual_seed(length)
    mask = masks(length) if masked else None
    q, k, context, qt, kt, target = (torch.randn(BATCH, HEADS, length, DIM) for _ in range(6))
    scores = torch.randn(BATCH, HEADS, length, 12)
    learned = [x.requires_grad_() for x in (q, k, scores, context)]
    return SeaParts(*learned, is_causal, mask), (qt, kt, target), learned


def dense_layer_loss(parts, qt, kt, target):
    """The published sums in float64, with N x N arrays."""
    mask, is_causal, length = parts.key_mask, parts.is_causal, parts.q.shape[2]
    q, k, scores, context, qt, kt, target = (x.double() for x in (*parts[:4], qt, kt, target))
    seen = visible(length, mask, is_causal)
    log_p = log_rows(qt @ kt.mT * DIM**-0.5, seen)
    kept = torch.ones(BATCH, length, dtype=torch.bool) if mask is None else mask
    kept = kept[:, None, :, None].expand_as(context)
    loss = (context - target)[kept].square().mean()
    for log_q in (dense_estimate(scores, seen), log_rows(q @ k.mT * DIM**-0.5, seen)):
        kl, sse = divergence(log_p, log_q, seen)
        count = BATCH * length if mask is None else mask.sum()
        loss = loss + 0.1 * kl.sum() / (count * (HEADS if is_causal else 1)) + sse.sum() / (BATCH * HEADS * length**2)
    return loss


@both
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [5, 33])
def test_layer_loss_is_the_published_one(length, masked, is_causal):
    parts, teacher, learned = layer_case(length, masked, is_causal)
    found, expected = sea_losses.layer_loss(parts, *teacher), dense_layer_loss(parts, *teacher)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for x, y in zip(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned), strict=True):
        assert float((x - y).abs().max()) <= 1e-5 * float(y.abs().max())


def test_scales_and_other_widths_of_the_teacher():
    parts, (_, _, target), _ = layer_case(9, False, True)
    qt, kt = torch.randn(2, BATCH, HEADS, 9, 5)
    plain = sea_losses.layer_loss(parts, qt, kt, target)
    scaled = parts._replace(q=parts.q * DIM**-0.5)
    same = sea_losses.layer_loss(scaled, qt * 5**-0.5, kt, target, scale=1.0, scale_teacher=1.0)
    torch.testing.assert_close(plain, same)


@both
def test_an_empty_batch_of_tokens_costs_nothing(is_causal):
    parts, teacher, learned = layer_case(6, True, is_causal)
    loss = sea_losses.layer_loss(parts._replace(key_mask=torch.zeros(BATCH, 6, dtype=torch.bool)), *teacher)
    assert loss.item() == 0
    assert not any(x.any() for x in torch.autograd.grad(loss, learned))


def test_no_tokens_cost_nothing():
    x = torch.zeros(2, 0, 5)
    assert sea_losses.hidden_loss([x], [x]).item() == 0 and sea_losses.logits_loss(x, x).item() == 0
    model = SeaAttention(16, 2, is_causal=True, num_columns=16, num_features=8, top_k=4)
    _, parts = model(torch.zeros(1, 0, 16), return_parts=True)
    teacher = torch.zeros(1, 2, 0, 8)
    assert sea_losses.layer_loss(parts, teacher, teacher, teacher).item() == 0


@both
def test_nothing_of_n_squared_is_kept(is_causal):
    length, sizes = 512, []
    torch.manual_seed(0)
    model = SeaAttention(16, 2, is_causal=is_causal, num_columns=16, num_features=8, top_k=4)
    x, teacher = torch.randn(1, length, 16), [torch.randn(1, 2, length, 8) for _ in range(3)]

    def pack(y):
        sizes.append(y.numel())
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        _, parts = model(x, return_parts=True)
        loss = sea_losses.layer_loss(parts, *teacher)
    loss.backward()
    assert sizes and max(sizes) < length**2 / 4


def test_losses_of_a_model():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 5, 7)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5])
    torch.testing.assert_close(sea_losses.mean_squares(x, y), F.mse_loss(x, y))
    torch.testing.assert_close(sea_losses.mean_squares(x, y, mask), F.mse_loss(x[mask], y[mask]))
    torch.testing.assert_close(
        sea_losses.hidden_loss([x, 2 * x], [y, y], mask),
        (F.mse_loss(x[mask], y[mask]) + F.mse_loss(2 * x[mask], y[mask])) / 2,
    )
    logs, p = x.log_softmax(-1), y.softmax(-1)
    torch.testing.assert_close(
        sea_losses.logits_loss(x, y), F.kl_div(logs.flatten(0, 1), p.flatten(0, 1), reduction="batchmean")
    )
    torch.testing.assert_close(sea_losses.logits_loss(x, y, mask), F.kl_div(logs[mask], p[mask], reduction="batchmean"))
    torch.testing.assert_close(
        sea_losses.logits_loss(x[:, 0], y[:, 0]), F.kl_div(logs[:, 0], p[:, 0], reduction="batchmean")
    )
    none = torch.zeros_like(mask)
    assert float(sea_losses.mean_squares(x, y, none)) == float(sea_losses.logits_loss(x, y, none)) == 0
    one = [torch.tensor(float(i)) for i in (1, 3)], *(torch.tensor(i) for i in (10.0, 100.0, 1000.0))
    assert float(sea_losses.distillation_loss(*one, is_causal=True)) == pytest.approx(2 + 50 + 20 + 100)
    assert float(sea_losses.distillation_loss(*one, is_causal=False)) == pytest.approx(2 + 100 + 10 + 100)


@both
def test_a_layer_learns_from_its_teacher(is_causal):
    torch.manual_seed(0)
    model = SeaAttention(16, HEADS, is_causal=is_causal, num_columns=12, num_features=8, top_k=4)
    x, mask = torch.randn(3, 24, 16), masks(24)[:3]
    dense = [nn.Linear(16, 16) for _ in range(3)]
    with torch.no_grad():
        q, k, v = (2 * p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in dense)
        target = st.softmax_attention(q, k, v, key_mask=mask, is_causal=is_causal)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        _, parts = model(x, mask, return_parts=True)
        loss = sea_losses.layer_loss(parts, q, k, target)
        loss.backward()
        learned = {n: p.grad for n, p in model.named_parameters() if not n.startswith("out_proj")}
        assert all(g is not None and torch.isfinite(g).all() for g in learned.values())
        assert all(g.any() for n, g in learned.items() if n not in ("k_proj.bias", "estimator.out_bias"))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def test_without_the_losses_a_causal_estimator_does_not_learn_where_to_look():
    model = SeaAttention(16, HEADS, is_causal=True, num_columns=12, num_features=8, top_k=4)
    model(torch.randn(1, 20, 16)).square().sum().backward()
    grads = {n: p.grad for n, p in model.estimator.named_parameters()}
    assert grads["encoder_weight"].any() and grads["scaler_weight"].any()
    assert all(
        grads[n] is None or not grads[n].any() for n in ("row_weight", "conv1_weight", "out_weight", "norm_weight")
    )
    assert subquad.__version__
