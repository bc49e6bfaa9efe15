"""The references of SEA against facts they were not written from: exact attention, differences, torch's layers."""

import numpy as np
import pytest

from ref import sea_layers as layers
from ref.loops import problem
from ref.sea_attention import sea_attention, sea_attention_bwd
from ref.sea_estimate import exp_features, identity_rows, relu_features, sea_estimate
from ref.softmax_attention import softmax_attention
from sparse_cases import masks, probabilities, sea_weights
from test_reference_softmax import assert_gradients

HEADS, DIM = 2, 3


def sea_problem(causal, masked, seq_q=5, seq_k=7, context=None, seed=0):
    q, k, v, dout, keywords = problem(seed, heads=HEADS, seq_q=seq_q, seq_k=seq_k, masked=masked, causal=causal)
    rng = np.random.default_rng(seed)
    probs = probabilities(2, HEADS, seq_q, 4).astype(np.float64)
    keywords |= dict(row_scale=rng.random((2, HEADS, seq_q)), mix=rng.random((2, HEADS, seq_q)), top_k=2)
    if context is not None:
        keywords["context"] = rng.normal(size=(2, HEADS, context, 4))
    return q, k, v, probs, dout, keywords


# SEA attention


@pytest.mark.parametrize("group", ["query", "row_heads", "head", "batch"])
@pytest.mark.parametrize("masked, causal", [(False, False), (True, False), (False, True), (True, True)])
def test_more_than_all_keys_is_exact_attention(group, masked, causal):
    q, k, v, probs, _, keywords = sea_problem(causal, masked)
    keywords = {name: keywords[name] for name in keywords if name.endswith("mask") or name == "is_causal"}
    if causal and group in ("head", "batch"):
        return
    top_k = 7 * 5 if group in ("head", "batch") else 7  # head and batch budget for a plane, not for a row
    got = sea_attention(q, k, v, probs, top_k=top_k, group=group, return_lse=True, **keywords)
    expected = softmax_attention(q, k, v, return_lse=True, **keywords)
    for actual, exact in zip(got, expected, strict=True):
        np.testing.assert_allclose(actual, exact, atol=1e-13)


@pytest.mark.parametrize("masked, causal", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("context", [None, 5, 1])
def test_sea_attention_gradients(masked, causal, context):
    q, k, v, probs, dout, keywords = sea_problem(causal, masked, context=context)
    dlse = np.random.default_rng(3).normal(size=dout.shape[:3])
    gradients = list(sea_attention_bwd(dout, q, k, v, probs, dlse=dlse, **keywords))
    inputs = [q, k, v, probs, keywords["row_scale"], keywords["mix"]]
    if context:
        inputs.append(keywords["context"])
    if causal or context:  # no gradient through the selection
        assert (gradients.pop(3) == 0).all()
        inputs.pop(3)
    forward = lambda: sea_attention(q, k, v, probs, return_lse=True, **keywords)  # noqa: E731
    assert_gradients(forward, gradients, inputs, (dout, dlse), 1e-6)


def test_an_open_mix_is_the_context():
    q, k, v, probs, _, keywords = sea_problem(True, False)
    keywords["mix"] = np.zeros_like(keywords["mix"])
    means = np.stack([v[:, :, : n + 3].mean(axis=2) for n in range(5)], axis=2)
    np.testing.assert_allclose(sea_attention(q, k, v[:, :HEADS], probs, **keywords), means, atol=1e-13)


# Layers


def test_layers_agree_with_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    nn, rng = torch.nn.functional, np.random.default_rng(0)
    tensor = torch.tensor
    x, weight, bias = rng.normal(size=(4, 9, 6)), rng.normal(size=(5, 4, 3, 3)), rng.normal(size=5)
    for seq in (1, 2, 9):
        part = tensor(x[:, :seq])
        same = nn.conv2d(part, tensor(weight), tensor(bias), padding=1)
        np.testing.assert_allclose(layers.convolution(part.numpy(), weight, bias), same, atol=1e-12)
        half = nn.conv2d(part, tensor(weight), tensor(bias), padding=1, stride=(2, 1))
        np.testing.assert_allclose(layers.convolution(part.numpy(), weight, bias, stride=2), half, atol=1e-12)
        # the published layer has 5 taps in time, the last two of them masked
        five = np.concatenate([weight, rng.normal(size=(5, 4, 2, 3))], axis=2)
        five[:, :, 3:] = 0
        causal = nn.conv2d(part, tensor(five), tensor(bias), padding=(4, 2), dilation=2)
        mine = layers.convolution(part.numpy(), weight, bias, dilation=2, before=4, after=0)
        np.testing.assert_allclose(mine, causal, atol=1e-12)
    for size, width in ((4, 6), (64, 66), (5, 7), (7, 5)):
        y = rng.normal(size=(2, 3, width))
        area = nn.interpolate(tensor(y), size=size, mode="area")
        np.testing.assert_allclose(layers.area_resize(y, size), area, atol=1e-12)
    for seq, wanted in ((2, 1), (4, 3), (4, 4), (10, 9), (3, 6)):
        y = rng.normal(size=(1, 2, seq, 5))
        bilinear = nn.interpolate(tensor(y), size=(wanted, 10), mode="bilinear", align_corners=False)
        mine = layers.bilinear_resize(layers.bilinear_resize(y, wanted, 2), 10, 3)
        np.testing.assert_allclose(mine, bilinear, atol=1e-12)
    y, gain, shift = rng.normal(size=(3, 7)), rng.normal(size=7), rng.normal(size=7)
    norm = nn.layer_norm(tensor(y), (7,), tensor(gain), tensor(shift), 1e-5)
    np.testing.assert_allclose(layers.layer_norm(y, gain, shift), norm, atol=1e-12)
    np.testing.assert_allclose(layers.gelu(y), nn.gelu(tensor(y)), atol=1e-12)
    np.testing.assert_allclose(layers.softmax(y), torch.softmax(tensor(y), -1), atol=1e-14)


def test_identity_rows_are_the_resized_identity():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for count, dim in ((1, 3), (2, 5), (9, 4), (4, 9), (5, 5), (7, 1)):
        eye = torch.eye(dim, dtype=torch.float64)[None, None]
        rows = torch.nn.functional.interpolate(eye, size=(count, dim), mode="bilinear", align_corners=True)[0, 0]
        np.testing.assert_allclose(identity_rows(count, dim, np.float64), rows, atol=1e-12)


# The estimator


def estimate_problem(causal, seq=11, batch=1, columns=8, heads=HEADS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, heads, seq, DIM)) for _ in range(3)], sea_weights(heads, DIM, 5, columns, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [1, 2, 7, 12])
def test_sea_estimate_agrees_with_torch(causal, seq):
    """The whole estimator once more, from torch's layers and dense attention matrices."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    nn = torch.nn.functional
    (q, k, v), weights = estimate_problem(causal, seq, batch=2)
    w = {name: torch.tensor(x, dtype=torch.float64) for name, x in weights.items()}
    tq, tk, tv = (torch.tensor(x) for x in (q, k, v))
    u, z = (DIM**-0.25 * x @ w["projection"].T for x in (tq, tk))
    if causal:
        a = (torch.relu(u) + 1e-3) @ (torch.relu(z) + 1e-3).mT
        a = torch.tril(a) / (torch.tril(a).sum(-1, keepdim=True) + 1e-6 * (torch.relu(u) + 1e-3).sum(-1, keepdim=True))
        position = w["position"][:seq]
    else:
        half = [(x**2).sum(-1, keepdim=True) / (2 * DIM**0.5) for x in (tq, tk)]
        fq = torch.exp(u - half[0] - u.amax(-1, keepdim=True)) + 1e-4
        fk = torch.exp(z - half[1] - z.amax((-1, -2), keepdim=True)) + 1e-4
        a = nn.normalize(fq @ fk.mT, p=1, dim=-1)
        eye = torch.eye(DIM, dtype=torch.float64)[None, None]
        position = nn.interpolate(eye, size=(seq, DIM), mode="bilinear", align_corners=True)[0, 0]
    context = a @ torch.cat([position.expand_as(tv), tv], -1)
    x = nn.linear(torch.cat([context, tv], -1), w["encoder_weight"], w["encoder_bias"])
    x = nn.gelu(nn.layer_norm(x, (2 * DIM,), w["encoder_norm_weight"], w["encoder_norm_bias"]))
    scales = torch.sigmoid(nn.linear(x, w["scaler_weight"], w["scaler_bias"]))
    splits = 2 if causal else 4
    rows = nn.linear(x, w["row_weight"], w["row_bias"]).unflatten(-1, (splits, -1)).movedim(3, 2).flatten(1, 2)

    def conv(x, name, **keywords):
        return nn.conv2d(x, w[name + "_weight"], w[name + "_bias"], **keywords)

    if causal:
        y = nn.layer_norm(rows, rows.shape[-1:], w["row_norm_weight"], w["row_norm_bias"])
        for name in ("conv1", "conv2"):
            y = torch.relu(conv(nn.pad(y, (2, 2, 4, 0)), name, dilation=2))
        y = nn.interpolate(y, scale_factor=(1, 4), mode="nearest")
        y = nn.conv2d(y, w["out_weight"][:, :, None, None], w["out_bias"], padding=(0, 1))
        y = nn.layer_norm(nn.interpolate(y, size=(seq, 8), mode="area"), (8,), w["norm_weight"], w["norm_bias"])
    else:
        y = torch.relu(conv(rows, "conv1", padding=1, stride=(2, 1)))
        y = nn.interpolate(torch.relu(conv(y, "conv2", padding=1)), scale_factor=(2, 1), mode="nearest")
        y = nn.interpolate(conv(y, "out", padding=1), size=(seq, 8), mode="bilinear", align_corners=False)
    probs, row_scale, mix = sea_estimate(q, k, v, weights, is_causal=causal)
    np.testing.assert_allclose(probs, torch.softmax(y, -1), atol=1e-11)
    np.testing.assert_allclose(np.stack([row_scale, mix], -1), scales, atol=1e-11)
    assert probs.std() > 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal):
    (q, k, v), weights = estimate_problem(causal, 13, batch=3)
    mask = masks(3, 13, 13)["key_mask"]
    padded = [np.where(mask[:, None, :, None], x, np.nan) for x in (q, k, v)]
    got = sea_estimate(*padded, weights, is_causal=causal, key_mask=mask)
    assert not mask[2].any() and not mask[1, 0]
    for b in range(3):
        alone = sea_estimate(*(x[b : b + 1][:, :, mask[b]] for x in (q, k, v)), weights, is_causal=causal)
        for whole, item in zip(got, alone, strict=True):
            np.testing.assert_array_equal(whole[b][:, mask[b]], item[0])
            assert (whole[b][:, ~mask[b]] == 0).all()


@pytest.mark.parametrize("cuts", [range(1, 14), (5, 6, 13), (4, 4, 9, 14), (0, 14)])
def test_chunks_are_one_pass(cuts):
    (q, k, v), weights = estimate_problem(True, 14, batch=2)
    mask = masks(2, 14, 14)["key_mask"]
    whole = sea_estimate(q, k, v, weights, is_causal=True, key_mask=mask, return_state=True)
    state, parts, edges = None, [], [0, *cuts, 14]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = [x[:, :, low:high] for x in (q, k, v)]
        *results, state = sea_estimate(
            *part, weights, is_causal=True, key_mask=mask[:, low:high], state=state, return_state=True
        )
        parts.append(results)
    for one, *several in zip(whole[:3], *parts, strict=True):
        np.testing.assert_allclose(np.concatenate(several, axis=2), one, atol=1e-13)
    for one, last in zip(whole[3], state, strict=True):
        np.testing.assert_allclose(last, one, atol=1e-12)


def test_later_tokens_change_nothing():
    (q, k, v), weights = estimate_problem(True, 14)
    whole = sea_estimate(q, k, v, weights, is_causal=True)
    for x in (q, k, v):
        x[:, :, 9:] = 1e3
    for before, after in zip(whole, sea_estimate(q, k, v, weights, is_causal=True), strict=True):
        np.testing.assert_array_equal(before[:, :, :9], after[:, :, :9])


def test_constant_features_average_and_constant_values_stay():
    """With no projection every key weighs the same; a value of 1 stays 1 (causal: up to eps)."""
    x = np.random.default_rng(0).normal(size=(2, 6, DIM))
    assert np.ptp(relu_features(x, np.zeros((5, DIM)))) == 0
    fq, fk = exp_features(x, np.zeros((5, DIM)), (2,)), exp_features(0 * x, np.zeros((5, DIM)), (1, 2))
    weights = fq @ fk.swapaxes(1, 2)
    np.testing.assert_allclose(weights / weights.sum(axis=-1, keepdims=True), np.full((2, 6, 6), 1 / 6), atol=1e-14)


def test_heads_turn_with_their_channels():
    heads = 3
    for causal in (True, False):
        (q, k, v), weights = estimate_problem(causal, 9, heads=heads)
        order, splits = np.array([2, 0, 1]), 2 if causal else 4
        channels = (order[:, None] * splits + np.arange(splits)).ravel()
        turned = dict(weights)
        for name in ("conv1", "conv2"):
            turned[name + "_weight"] = weights[name + "_weight"][channels][:, channels]
            turned[name + "_bias"] = weights[name + "_bias"][channels]
        turned["out_weight"], turned["out_bias"] = weights["out_weight"][order][:, channels], weights["out_bias"][order]
        plain = sea_estimate(q, k, v, weights, is_causal=causal)
        other = sea_estimate(*(x[:, order] for x in (q, k, v)), turned, is_causal=causal)
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a[:, order], b, atol=1e-12)
