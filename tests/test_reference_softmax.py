"""The references of softmax and linear attention and their operators against facts they were not written from."""

import math

import numpy as np
import pytest

from ref.feature_map import feature_map, feature_map_bwd
from ref.linear_attention import linear_attention, linear_attention_bwd
from ref.loops import differences, problem, visible, z_scores
from ref.merge_states import merge_states, merge_states_bwd
from ref.orthogonal_projection import orthogonal_projection
from ref.philox import random_normal
from ref.segment_mean import segment_mean, segment_mean_bwd
from ref.softmax_attention import softmax_attention, softmax_attention_bwd
from ref.softmax_sample import softmax_sample
from ref.sum_arrays import sum_arrays

VISIBILITIES = [(False, False), (False, True), (True, False), (True, True)]
FEATURES = ["positive", "trig", "hyperbolic", "relu", "elu"]


def assert_gradients(forward, gradients, inputs, cotangents, atol=1e-7):
    """`forward()` reads `inputs` and returns outputs (None: skipped) that `cotangents` weigh."""
    assert len(gradients) == len(inputs)

    def loss():
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = zip(outputs, cotangents, strict=True)
        return sum(np.nansum(g * np.where(np.isfinite(y), y, 0)) for y, g in pairs if g is not None)

    for gradient, x in zip(gradients, inputs, strict=True):
        assert gradient.shape == x.shape and np.isfinite(gradient).all() and gradient.any()
        np.testing.assert_allclose(gradient, differences(loss, x), atol=atol)


# Softmax attention


@pytest.mark.parametrize("masked, causal", VISIBILITIES)
@pytest.mark.parametrize("window", [None, (2, -1), (1, 1)])
def test_softmax_attention_by_loops(masked, causal, window):
    q, k, v, dout, visibility = problem(masked=masked, causal=causal)
    bias = np.random.default_rng(1).normal(size=(2, 4, 7))
    bias[:, :, 3] = -np.inf
    out, lse = softmax_attention(
        q, k, v, scale=0.7, key_bias=bias, key_norm_bias=-0.3, window=window, return_lse=True, **visibility
    )
    numerator, total = np.zeros(dout.shape), np.zeros(dout.shape[:3])
    for b, h, g, i, j in visible(q, k, visibility):
        offset = j - i - 2
        if window is None or (offset >= -window[0] and (window[1] < 0 or offset <= window[1])):
            weight = math.exp(0.7 * q[b, h, i] @ k[b, g, j] - 0.3 * k[b, g, j] @ k[b, g, j] + bias[b, h, j])
            total[b, h, i] += weight
            numerator[b, h, i] += weight * v[b, g, j] if weight else 0
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total), atol=1e-12)
    np.testing.assert_allclose(out, numerator / np.where(total > 0, total, 1)[..., None], atol=1e-12)


@pytest.mark.parametrize("masked, causal", VISIBILITIES)
@pytest.mark.parametrize("bias_heads", [None, 1, 2, 4])
def test_softmax_attention_gradients(masked, causal, bias_heads):
    q, k, v, dout, visibility = problem(seed=1, masked=masked, causal=causal)
    rng = np.random.default_rng(2)
    dlse = rng.normal(size=dout.shape[:3])
    keywords = dict(scale=0.6, key_norm_bias=-0.2, pair_bias=rng.normal(size=(2, 4, 5, 7)), **visibility)
    inputs = [q, k, v]
    if bias_heads:
        keywords["key_bias"] = rng.normal(size=(2, bias_heads, 7))
        inputs.append(keywords["key_bias"])
    gradients = softmax_attention_bwd(dout, q, k, v, dlse=dlse, **keywords)
    inputs.append(keywords["pair_bias"])
    assert_gradients(
        lambda: softmax_attention(q, k, v, return_lse=True, **keywords), gradients, inputs, (dout, dlse), 1e-6
    )


def test_softmax_attention_agrees_with_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v, dout, _ = problem(seed=2, heads_kv=4, seq_k=5, causal=True)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    out.backward(torch.tensor(dout))
    np.testing.assert_allclose(softmax_attention(q, k, v, is_causal=True), out.detach(), atol=1e-13)
    for gradient, leaf in zip(softmax_attention_bwd(dout, q, k, v, is_causal=True), leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=1e-13)


def test_softmax_attention_of_nothing_and_of_huge_logits():
    q, k, v, dout, _ = problem()
    out, lse = softmax_attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert (out == 0).all() and np.isneginf(lse).all()
    out, lse = softmax_attention(1e4 * q, 1e4 * k, v, return_lse=True)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    assert softmax_attention(q, k, v, dtype=np.float32).dtype == np.float32


def test_merged_states_are_attention_over_both_sets():
    q, k, v, dout, _ = problem(seed=3)
    dlse = np.random.default_rng(0).normal(size=dout.shape[:3])
    both = softmax_attention(q, k, v, return_lse=True)
    states = []
    for keys in (slice(None, 3), slice(3, None)):
        states += softmax_attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
    for merged, whole in zip(merge_states(*states), both, strict=True):
        np.testing.assert_allclose(merged, whole, atol=1e-13)
    gradients = merge_states_bwd(dout, *states, dlse=dlse)
    assert_gradients(lambda: merge_states(*states), gradients, states, (dout, dlse))
    empty = np.full(dout.shape, np.nan), np.full(dlse.shape, -np.inf)
    np.testing.assert_array_equal(merge_states(*both, *empty)[0], both[0])
    np.testing.assert_array_equal(merge_states(*empty, *empty)[0], 0 * dout)
    np.testing.assert_array_equal(merge_states_bwd(dout, *empty, *both)[2], dout)


def test_sum_arrays_by_loops():
    rng = np.random.default_rng(4)
    a, b, c = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 2, 3, 5)), rng.normal(size=(1, 4, 3, 5))
    total = sum_arrays([b, a], [-1, 2])
    for i, h in np.ndindex(2, 2):
        np.testing.assert_allclose(total[i, h], 2 * a[i, 2 * h] + 2 * a[i, 2 * h + 1] - b[i, h])
    np.testing.assert_allclose(sum_arrays([a, c], batch=1, heads=1)[0, 0], a.sum((0, 1)) + c.sum((0, 1)))


@pytest.mark.parametrize("keywords", [dict(num_segments=3), dict(num_segments=9), dict(segment_size=3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_segment_mean(keywords, masked):
    rng = np.random.default_rng(5)
    x, mask = rng.normal(size=(3, 2, 8, 4)), None
    if masked:
        mask = np.array([[1, 1, 0, 1, 1, 1, 0, 1], [0] * 8, [0, 0, 0, 0, 1, 0, 0, 0]], bool)
        x[np.broadcast_to(~mask[:, None], x.shape[:3])] = np.nan
    out, counts = segment_mean(x, mask=mask, return_counts=True, **keywords)
    for b, c in np.ndindex(counts.shape):
        valid = np.arange(8) if mask is None else np.nonzero(mask[b])[0]
        if "segment_size" in keywords:
            tokens = [n for n in valid if 3 * c <= n < 3 * c + 3]
        else:  # array_split puts the longer parts first
            parts = np.array_split(valid[::-1], min(keywords["num_segments"], len(valid)) or 1)[::-1]
            tokens = parts[c][::-1] if c < len(parts) else []
        assert counts[b, c] == len(tokens)
        np.testing.assert_allclose(out[b, :, c], x[b][:, tokens].mean(axis=1) if len(tokens) else 0, atol=1e-14)
    dout, base = rng.normal(size=out.shape), rng.normal(size=x.shape)
    gradient = segment_mean_bwd(dout, 8, mask=mask, **keywords)
    assert_gradients(lambda: segment_mean(x, mask=mask, **keywords), [gradient], [x], (dout,))
    np.testing.assert_array_equal(segment_mean_bwd(dout, 8, mask=mask, base=base, **keywords), gradient + base)


def test_paired_segments_are_equally_many():
    x, mask = np.ones((2, 1, 6, 3)), np.array([[1] * 6, [1, 0, 0, 0, 0, 0]], bool)
    paired = np.array([[1, 0, 1, 0], [1, 1, 1, 1]], bool)
    a = segment_mean(x, 5, mask=mask, paired_mask=paired, return_counts=True)[1]
    b = segment_mean(x[:, :, :4], 5, mask=paired, paired_mask=mask, return_counts=True)[1]
    np.testing.assert_array_equal(a, [[3, 3, 0, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(b, [[1, 1, 0, 0, 0], [4, 0, 0, 0, 0]])


@pytest.mark.statistical
def test_softmax_samples_have_softmax_frequencies():
    """20000 draws for 3 queries over 150 keys in 3 blocks: |z| <= 5 each, a false alarm in 4e3; and no masked key."""
    rng, draws = np.random.default_rng(6), 20000
    q, k, mask = rng.normal(size=(1, 1, 3, 4)), 2 * rng.normal(size=(1, 1, 150, 4)), rng.random((1, 150)) < 0.8
    k[0, 0, ~mask[0]] = np.nan
    indices, margin = softmax_sample(q, k, num_samples=draws, key_mask=mask, seed=3, return_margin=True)
    p = softmax_attention(q, k, np.eye(150)[None, None], key_mask=mask)[0, 0]
    for n in range(3):
        counts = np.bincount(indices[0, 0, :, n], minlength=150)
        assert counts[~mask[0]].sum() == 0
        assert (np.abs(counts - draws * p[n]) <= 5 * np.sqrt(draws * p[n] * (1 - p[n])) + 1).all()
    assert (margin >= 0).all() and (margin < 1e-6).mean() < 1e-3
    np.testing.assert_array_equal(softmax_sample(q, k, key_mask=0 * mask), np.full((1, 1, 1, 3), -1))
    np.testing.assert_array_equal(softmax_sample(q, k[:, :, :0]), np.full((1, 1, 1, 3), -1))


# Linear attention


def recurrence(fq, fk, v, key_mask=None, gate=None, decay=None, weight=None, normalize=True):
    """Causal, one batch item and head a time, as the header writes it."""
    out = np.zeros((*fq.shape[:3], v.shape[-1]))
    for b, h in np.ndindex(fq.shape[:2]):
        g = h // (fq.shape[1] // fk.shape[1])
        s, z = np.zeros((fk.shape[-1], v.shape[-1])), np.zeros(fk.shape[-1])
        offset = fk.shape[2] - fq.shape[2]
        for m in range(fk.shape[2]):
            if key_mask is None or key_mask[b, m]:
                keep = 1 if gate is decay is None else (gate if decay is None else decay)[b, g, m]
                key = fk[b, g, m] * (1 if gate is None else 1 - keep)
                key = key * (1 if weight is None else math.exp(weight[b, g, m]))
                s, z = keep * s + np.outer(key, v[b, g, m]), keep * z + key
            if m >= offset:
                f = fq[b, h, m - offset]
                out[b, h, m - offset] = f @ s / ((f @ z or 1) if normalize else 1)
    return out


def features(seed=0, masked=False, seq_q=5, seq_k=7):
    fq, fk, v, dout, visibility = problem(seed=seed, seq_q=seq_q, seq_k=seq_k, dim=6, masked=masked)
    rng = np.random.default_rng(seed + 100)
    rates = rng.random((2, 2, seq_k))
    rates[:, :, 1], rates[:, 0, 4], rates[:, 1, 2] = 0, 1, 0
    return np.abs(np.nan_to_num(fq, nan=0.5)), np.abs(fk), v, np.nan_to_num(dout), visibility.get("key_mask"), rates


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rate", [None, "gate", "decay"])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_attention_is_the_recurrence(masked, rate, normalize):
    fq, fk, v, _, key_mask, rates = features(masked=masked)
    keywords = dict(key_mask=key_mask, normalize=normalize) | ({rate: rates} if rate else {})
    out = recurrence(fq, fk, v, **keywords)
    np.testing.assert_allclose(linear_attention(fq, fk, v, is_causal=True, **keywords), out, atol=1e-12)
    if normalize:
        with np.errstate(divide="ignore"):
            logs = np.log(fq), np.log(fk)
        out_log = linear_attention(*logs, v, is_causal=True, log_features=True, **keywords)
        np.testing.assert_allclose(out_log, out, atol=1e-12)
        weight = np.random.default_rng(1).normal(size=fk.shape[:3])
        out = recurrence(fq, fk, v, weight=weight, **keywords)
        weighted = linear_attention(fq, fk, v, is_causal=True, key_log_weight=weight + 3, **keywords)
        np.testing.assert_allclose(weighted, out, atol=1e-12)


@pytest.mark.parametrize("mode", ["linear", "log", "weighted"])
@pytest.mark.parametrize("rate", [None, "gate", "decay"])
def test_linear_attention_in_two_parts(mode, rate):
    fq, fk, v, _, key_mask, rates = features(seed=1, masked=True, seq_q=7)
    keywords = dict(is_causal=True, log_features=mode == "log")
    weight = 300 * np.random.default_rng(2).normal(size=fk.shape[:3])
    fq, fk = (np.log(fq + 0.1), 300 * np.log(fk)) if mode == "log" else (fq, fk)
    state, parts = None, []
    for part in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 7)):
        cut = dict(key_mask=key_mask[:, part], key_log_weight=weight[:, :, part] if mode == "weighted" else None)
        cut |= {rate: rates[:, :, part]} if rate else {}
        out, state = linear_attention(
            *(x[:, :, part] for x in (fq, fk, v)), state=state, return_state=True, **cut, **keywords
        )
        parts.append(out)
    cut = dict(key_mask=key_mask, key_log_weight=weight if mode == "weighted" else None)
    whole = linear_attention(fq, fk, v, **cut, **({rate: rates} if rate else {}), **keywords)
    np.testing.assert_allclose(np.concatenate(parts, axis=2), whole, atol=1e-11)


def test_bidirectional_linear_attention_by_matrices():
    fq, fk, v, _, _, _ = features(seed=2)
    a = fq @ np.repeat(fk, 2, axis=1).swapaxes(-1, -2)
    out = a @ np.repeat(v, 2, axis=1) / a.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(linear_attention(fq, fk, v), out, atol=1e-13)
    np.testing.assert_allclose(linear_attention(np.log(fq), np.log(fk), v, log_features=True), out, atol=1e-13)
    assert (linear_attention(0 * fq, fk, v) == 0).all()
    assert (linear_attention(fq, fk[:, :, :0], v[:, :, :0]) == 0).all()


@pytest.mark.parametrize("mode", ["linear", "plain", "log", "weighted"])
@pytest.mark.parametrize(
    "rate, masked, causal",
    [(None, False, False), (None, True, False), (None, True, True), ("gate", True, True), ("decay", True, True)],
)
def test_linear_attention_gradients(mode, rate, masked, causal):
    fq, fk, v, dout, key_mask, rates = features(seed=3, masked=masked)
    fq, fk = (np.log(fq), np.log(fk)) if mode == "log" else (fq + 0.1, fk)
    keywords = dict(is_causal=causal, key_mask=key_mask, normalize=mode != "plain", log_features=mode == "log")
    inputs = [fq, fk, v]
    if mode == "weighted":
        keywords["key_log_weight"] = np.random.default_rng(4).normal(size=fk.shape[:3])
        inputs.append(keywords["key_log_weight"])
    if rate:
        keywords[rate] = rates
        inputs.append(rates)
    if causal:  # what comes in is a constant
        rng = np.random.default_rng(5)
        shift = rng.normal(size=(2, 2, 6)) if mode in ("log", "weighted") else None
        keywords["state"] = rng.normal(size=(2, 2, 6, 4)), rng.random((2, 2, 6)), shift
    gradients = linear_attention_bwd(dout, fq, fk, v, **keywords)
    forward = lambda: linear_attention(fq, fk, v, **keywords)  # noqa: E731
    assert_gradients(forward, gradients, inputs, (dout,), 1e-6)


# Features and projections


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("blocks", [None, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_feature_map_gradients(name, blocks, masked):
    rng = np.random.default_rng(7)
    x, mask = rng.normal(size=(2, 4, 3, 5)), np.array([[1, 0, 1], [0, 1, 0]], bool) if masked else None
    if masked:
        x[np.broadcast_to(~mask[:, None], x.shape[:3])] = np.nan
    projection = None if name == "elu" else rng.normal(size=(6, 5) if blocks is None else (blocks, 6, 5))
    for log in [False, True] if name in ("positive", "hyperbolic") else [False]:
        keywords = dict(projection=projection, features=name, scale=0.4, mask=mask)
        forward = lambda log=log, keywords=keywords: feature_map(  # noqa: E731
            x, return_log_factor=name == "trig", log=log, **keywords
        )
        outputs = forward() if name == "trig" else (forward(),)
        cotangents = [rng.normal(size=y.shape) for y in outputs]
        dlog_factor = cotangents[1] if name == "trig" else None
        gradients = feature_map_bwd(cotangents[0], x, dlog_factor=dlog_factor, log=log, **keywords)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        assert_gradients(forward, gradients, [x, projection][: len(gradients)], cotangents)
        if log:
            features = feature_map(x, **keywords)
            np.testing.assert_allclose(np.exp(outputs[0]) / math.sqrt(features.shape[-1]), features, rtol=1e-12)
        if masked and not log:
            assert (outputs[0][np.broadcast_to(~mask[:, None], x.shape[:3])] == 0).all()


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "trig"])
def test_kernel_estimates_have_the_stated_mean_and_variance(name):
    """400000 single draws: the mean within 5 standard errors, the variance within 8 % (of 4th moments as heavy)."""
    rng, draws = np.random.default_rng(8), 400_000
    x, y = rng.normal(size=(2, 5)) * 0.4
    scale = 0.5
    rows = rng.normal(size=(draws, 1, 5))
    x, y = (np.broadcast_to(a, (1, draws, 1, 5)) for a in (x, y))
    fx, fy = (feature_map(a, rows, name, scale=scale) for a in (x, y))
    estimate = (fx * fy).sum(axis=-1)[0, :, 0]
    x, y = x[0, 0, 0] * math.sqrt(scale), y[0, 0, 0] * math.sqrt(scale)
    if name == "trig":
        estimate = estimate * math.exp((x @ x + y @ y) / 2)
    sm, z, apart = math.exp(x @ y), (x + y) @ (x + y), (x - y) @ (x - y)
    variance = {
        "positive": sm**2 * math.expm1(z),
        "hyperbolic": sm**2 / 2 * math.expm1(z) * -math.expm1(-z),
        "trig": math.exp(x @ x + y @ y) / 2 * math.expm1(-apart) ** 2,
    }[name]
    assert abs(estimate.mean() - sm) <= 5 * math.sqrt(variance / draws)
    assert abs(estimate.var() / variance - 1) < 0.08


@pytest.mark.parametrize("kind", ["haar", "published", "hadamard"])
def test_projection_rows_are_orthogonal_with_normal_lengths(kind):
    dim, rows = 8, orthogonal_projection(21, 8, seed=3, heads=2, kind=kind)
    for h, start in np.ndindex(2, 3):
        block = rows[h, start * dim : (start + 1) * dim]
        gram = block @ block.T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
    lengths = np.linalg.norm(random_normal((2, 21, dim), 3, 5), axis=-1)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), lengths, rtol=1e-12)
    np.testing.assert_array_equal(orthogonal_projection(21, 8, seed=3, kind=kind), rows[0])
    np.testing.assert_allclose(orthogonal_projection(9, 8, seed=3, kind=kind), rows[0, :9], rtol=1e-12)
    assert orthogonal_projection(7, 5, seed=3, kind=kind).shape == (7, 5)


@pytest.mark.statistical
def test_the_sign_fix_removes_the_bias():
    """Positive features along +-1 (d = 8, |z|^2 = 2), 3000 blocks: the mean of e^{<w, z> - |z|^2 / 2} is 1 within 5
    standard errors with the fix and off by 20 % without. Hyperbolic features at |z|^2 = 1/2: the mean of 8 orthogonal
    rows has 0.39 of the variance of independent ones."""
    haar, published = (orthogonal_projection(8, 8, seed=1, heads=3000, kind=kind) for kind in ("haar", "published"))
    estimates = lambda rows, x: np.exp(rows @ np.full(8, x) - 4 * x * x)  # noqa: E731
    for sign in (1, -1):
        assert abs(z_scores(estimates(haar, 0.5 * sign).mean(axis=1), 1)) <= 5
        assert sign * (1 - estimates(published, 0.5 * sign).mean()) > 0.2
    both = (estimates(haar, 0.25) + estimates(haar, -0.25)).mean(axis=1) / 2
    assert abs(z_scores(both, 1)) <= 5 and both.var() < 0.5 * math.expm1(0.5) * -math.expm1(-0.5) / 2 / 8
