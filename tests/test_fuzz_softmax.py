"""Random shapes, strides, dtypes and options of the softmax family: no crash, no NaN, no mismatch with the reference.

SUBQUAD_FUZZ_CASES sets the number of cases; function and seed of a failing one are in its name.
"""

import importlib
import inspect
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import subquad
from budgets import Expected, as_tuple, without_queries
from cases import Case, arrays, as_dtype
from test_fuzz import BAD_VALUES, draw_case, on_some_row, some_dtype
from tolerance import sum_floor

CASES = int(os.environ.get("SUBQUAD_FUZZ_CASES", "150"))
# A few numbers may come out exact by luck, so that the strict budgets are those of each function's own tests.
FACTOR = 4.0


@dataclass
class Drawn:
    """A call. keywords: for both sides; given: for the library alone; known: what those stand for, for the reference.
    dtypes: of the results where not that of the inputs. hidden: a gradient that only the reference gives.
    amplified: by how much small denominators may multiply roundings."""

    inputs: list[Any]
    keywords: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    hidden: int | None = None
    amplified: float = 1.0


def layout(x, rng):
    """The same values at other strides."""
    if isinstance(x, tuple):
        return tuple(layout(part, rng) for part in x)
    if not isinstance(x, np.ndarray) or x.ndim < 2:
        return x
    kind = rng.integers(4)
    if kind == 1:
        wide = np.full((*x.shape[:-1], x.shape[-1] + 3), 7, x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if kind == 2:
        return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    if kind == 3:
        return np.ascontiguousarray(x.swapaxes(0, -2)).swapaxes(0, -2)
    return x


def some_case(rng):
    """Small sizes, and half the time more tokens than a tile of any row has."""
    case = draw_case(rng, 40, 70)
    return case if rng.random() < 0.5 else replace(case, seq_q=int(rng.integers(1, 80)), seq_k=int(rng.integers(1, 80)))


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def some_scale(rng):
    return [None, None, 0.1, 0.6][rng.integers(4)]


def attention(rng, case, dtype, causal=True):
    """q, k, v of moderate norms and the masks; NaN is where nothing may look."""
    q, k, v, keywords = without_queries(*arrays(case, int(rng.integers(1000)), "float32"))
    if not causal:
        del keywords["is_causal"]
    return [as_dtype(np.asarray(x, np.float64) * s, dtype) for x, s in ((q, 0.6), (k, 0.6), (v, 1))], keywords


def softmax_attention(rng, case, dtype):
    inputs, keywords = attention(rng, case, dtype)
    keywords["scale"] = some_scale(rng)
    if rng.random() < 0.5:
        bias = normal(rng, case.batch, rng.choice([1, case.heads_kv, case.heads]), case.seq_k)
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        keywords["key_bias"] = bias
    if rng.random() < 0.4:
        keywords["window"] = tuple(int(n) for n in rng.integers(-1, 8, 2))
    return Drawn(inputs, keywords | dict(return_lse=True), dtypes=(dtype, "float32"))


def linear_attention(rng, case, dtype):
    (fq, fk, v), keywords = attention(rng, case, "float32")
    form = rng.choice(["linear", "plain", "log", "weighted"])
    keywords["normalize"] = bool(form != "plain")
    if form == "log":
        keywords["log_features"] = True
    else:
        fq, fk = np.abs(fq) + np.float32(0.1), np.abs(fk) + np.float32(0.1)
    if form == "weighted":
        keywords["key_log_weight"] = 3 * normal(rng, *fk.shape[:3])
    rate = rng.choice(["none", "gate", "decay"]) if case.causal else "none"
    if rate != "none":
        keywords[str(rate)] = rng.random(fk.shape[:3]).astype(np.float32)
    return Drawn([as_dtype(np.asarray(x, np.float64), dtype) for x in (fq, fk, v)], keywords, amplified=10.0)


def feature_map(rng, case, dtype):
    x, mask = normal(rng, case.batch, case.heads, case.seq_q, case.dim), rng.random((case.batch, case.seq_q)) < 0.7
    features = str(rng.choice(["positive", "hyperbolic", "trig", "relu", "elu"]))
    keywords = dict(features=features, log=bool(features in ("positive", "hyperbolic") and rng.random() < 0.5))
    if features != "elu":
        rows = normal(rng, case.heads_kv, int(rng.integers(1, 40)), case.dim)
        keywords |= dict(projection=rows if rng.random() < 0.5 else rows[0], scale=some_scale(rng))
    if case.masked:
        x[np.broadcast_to(~mask[:, None], x.shape[:3])] = np.nan
        keywords["mask"] = mask
    return Drawn([as_dtype(x.astype(np.float64), dtype)], keywords, dtypes=("float32",) if keywords["log"] else ())


def segment_mean(rng, case, dtype):
    x, mask = normal(rng, case.batch, case.heads, case.seq_q, case.dim), rng.random((case.batch, case.seq_q)) < 0.7
    keywords = {str(rng.choice(["num_segments", "segment_size"])): int(rng.integers(1, 30))}
    if case.masked:
        x[np.broadcast_to(~mask[:, None], x.shape[:3])] = np.nan
        keywords["mask"] = mask
        if "num_segments" in keywords and rng.random() < 0.5:
            keywords["paired_mask"] = rng.random((case.batch, int(rng.integers(1, 20)))) < 0.7
    return Drawn([as_dtype(x.astype(np.float64), dtype)], keywords)


def rfa_attention(rng, case, dtype):
    inputs, keywords = attention(rng, case, dtype)
    keywords["features"] = features = str(rng.choice(["positive", "hyperbolic", "trig", "relu", "elu"]))
    if case.causal and rng.random() < 0.5:
        keywords["gate"] = rng.random((case.batch, case.heads_kv, case.seq_k)).astype(np.float32)
    if features == "elu":
        return Drawn(inputs, keywords)
    # trig features get a small scale, so that their denominators stay away from 0
    keywords["scale"] = 0.05 / case.dim if features == "trig" else some_scale(rng)
    count, seed, amplified = int(rng.integers(12, 50)), int(rng.integers(2**62)), 100.0 if features == "relu" else 1.0
    if rng.random() < 0.5:
        rows = normal(rng, case.heads_kv, count, case.dim)
        rows = rows if rng.random() < 0.5 else rows[0]
        return Drawn(inputs, keywords | dict(projection=rows), amplified=amplified)
    if rng.random() < 0.5:
        rows = subquad.random_normal((case.heads_kv, count, case.dim), seed=seed, stream=4)
    else:
        rows = subquad.orthogonal_projection(count, case.dim, seed=seed, heads=case.heads_kv)
        seed = np.array(seed)
    drawn = dict(num_features=count, seed=seed, orthogonal=isinstance(seed, np.ndarray))
    return Drawn(inputs, keywords, drawn, dict(projection=rows), hidden=3, amplified=amplified)


def randomized_attention(rng, case, dtype):
    inputs, keywords = attention(rng, case, dtype, causal=False)
    keywords |= dict(scale=some_scale(rng), grad=str(rng.choice(["pathwise", "unbiased"])))
    keywords["noise_std"] = ["exact", "published", 0.5][rng.integers(3)]
    samples, seed = int(rng.integers(1, 4)), int(rng.integers(2**62))
    drawing = dict(num_samples=samples, seed=seed)
    mask = dict(key_mask=keywords["key_mask"]) if case.masked else {}
    indices = subquad.softmax_sample(*inputs[:2], scale=keywords["scale"], **drawing, **mask)
    shape = case.heads * samples, case.seq_q, case.dim
    noise = subquad.random_normal(shape, seed=seed, stream=7).reshape(case.heads, samples, case.seq_q, case.dim)
    draws = dict(indices=indices, noise=np.stack([noise] * case.batch))
    return Drawn(inputs, keywords, draws if rng.random() < 0.5 else drawing, draws)


def lara_attention(rng, case, dtype):
    q, k, v, keywords = arrays(case, int(rng.integers(1000)), "float32")
    del keywords["is_causal"]
    inputs = [as_dtype(np.asarray(x, np.float64) * s, dtype) for x, s in ((q, 0.6), (k, 0.6), (v, 1))]
    keywords |= dict(mis=str(rng.choice(["opt", "bh", "biased"])), t_norm=str(rng.choice(["query", "landmark"])))
    keywords |= dict(
        alpha_coeff=float(rng.uniform(0, 2)), scale=some_scale(rng), num_landmarks=int(rng.integers(1, 30))
    )
    count = min(keywords["num_landmarks"], case.seq_q, case.seq_k)
    if rng.random() < 0.5:
        count = int(rng.integers(1, 12))
        shapes = ((case.batch, heads, count, case.dim) for heads in (case.heads, case.heads_kv))
        keywords["landmarks"] = tuple(normal(rng, *shape) for shape in shapes)
        del keywords["num_landmarks"]
    kind, rounds = rng.choice(["none", "given", "drawn", "antithetic"]), int(rng.integers(1, 4))
    if kind == "none":
        return Drawn(inputs, keywords, amplified=10.0)
    keywords["noise_std"] = ["exact", "published", 0.5][rng.integers(3)]
    if kind == "given":
        noise = normal(rng, case.batch, case.heads, count * rounds, case.dim)
        return Drawn(inputs, keywords | dict(noise=noise), amplified=10.0)
    seed, twice = int(rng.integers(2**62)), kind == "antithetic"
    noise = subquad.random_normal((1, case.heads, count * rounds, case.dim), seed=seed, stream=7)
    given = dict(seed=seed, samples_per_landmark=rounds * (1 + twice), antithetic=bool(twice))
    return Drawn(inputs, keywords, given, dict(noise=noise, antithetic=bool(twice)), amplified=10.0)


def eva_attention(rng, case, dtype):
    inputs, keywords = attention(rng, case, dtype)
    chunk, times = int(rng.integers(1, 12)), int(rng.integers(1, 5))
    window, chunk = (chunk * times, chunk) if rng.random() < 0.7 else (chunk, chunk * times)
    partition = bool(rng.random() < 0.7)
    if not (partition or case.causal):
        window = int(rng.integers(1, 40))
    keywords |= dict(window=window, chunk_size=chunk, partition=partition, chunk_mass=bool(rng.random() < 0.7))
    keywords["scale"] = some_scale(rng)
    shape = case.batch, case.heads_kv, -(-case.seq_k // chunk), case.dim
    if rng.random() < 0.4:
        keywords["landmarks"] = normal(rng, *shape), normal(rng, *shape)
    kind, seed = rng.choice(["none", "given", "drawn"]), int(rng.integers(2**62))
    if kind == "given":
        keywords["noise"] = normal(rng, *shape)
    if kind != "drawn":
        return Drawn(inputs, keywords)
    noise = subquad.random_normal(shape[1:], seed=seed, stream=7)
    return Drawn(inputs, keywords, dict(seed=seed), dict(noise=np.stack([noise] * case.batch)))


FUNCTIONS = [
    softmax_attention, linear_attention, feature_map, segment_mean, rfa_attention, randomized_attention, lara_attention,
    eva_attention,
]  # fmt: skip


@pytest.mark.parametrize("draw", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(max(1, CASES // 5)))
def test_random_calls(draw, seed):
    name = draw.__name__
    rng = np.random.default_rng([seed, len(name)])
    dtype = some_dtype(rng)
    with on_some_row(rng):
        check(name, draw(rng, some_case(rng), dtype), dtype, rng)


def check(name, drawn, dtype, rng):
    reference, inputs = importlib.import_module(f"ref.{name}"), drawn.inputs
    known, given = drawn.keywords | drawn.known, drawn.keywords | drawn.given
    expected = Expected(getattr(reference, name), inputs, known)
    got = as_tuple(call(getattr(subquad, name), inputs, given, rng))
    floor = 4 * drawn.amplified * sum_floor(largest(inputs[-1])[0])
    expected.check(got, "out", drawn.dtypes or dtype, floor, FACTOR)

    dout = as_dtype(rng.standard_normal(got[0].shape), str(got[0].dtype))
    if given.pop("return_lse", False):
        del known["return_lse"]
        known["dlse"] = given["dlse"] = normal(rng, *got[1].shape)
    inputs = [dout, *(inputs if name != "segment_mean" else [inputs[0].shape[2]])]

    def backward(*wide, **keywords):
        gradients = as_tuple(getattr(reference, f"{name}_bwd")(*wide, **keywords))
        return tuple(x for i, x in enumerate(gradients) if i != drawn.hidden)

    expected = Expected(backward, [np.asarray(x) for x in inputs], known)
    got = as_tuple(call(getattr(subquad, f"{name}_bwd"), inputs, given, rng))
    dtypes = ([dtype] * len(drawn.inputs) + ["float32"] * 9)[: len(got)]
    floor = drawn.amplified * rounding(dout, drawn.inputs[-1], [*drawn.inputs[:-1], *known.values()])
    expected.check(got, "gradient", dtypes, floor, FACTOR)


def call(function, inputs, keywords, rng):
    return function(*(layout(x, rng) for x in inputs), **{name: layout(x, rng) for name, x in keywords.items()})


def largest(x):
    """The largest number and the largest norm of a row, at least 1."""
    x = np.asarray(x, np.float64)
    x = np.where(np.isfinite(x), x, 0)
    return max(1.0, np.abs(x).max(initial=0)), max(1.0, np.linalg.norm(x, axis=-1).max(initial=0))


def rounding(dout, v, others):
    """What the order of sums <dout, v> may cost, times the largest number of each other array: gradients may cancel."""
    factors = [largest(x)[0] for x in others if isinstance(x, np.ndarray) and x.dtype == np.float32]
    return 4 * sum_floor(largest(dout)[1] * largest(v)[1] * np.prod(factors))


@pytest.mark.parametrize("draw", [linear_attention, rfa_attention, eva_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(max(1, CASES // 5)))
def test_random_parts_with_a_state_are_the_whole(draw, seed):
    rng = np.random.default_rng([10_000 + seed, len(draw.__name__)])
    dtype, case = some_dtype(rng), some_case(rng)
    case = replace(case, causal=True, seq_q=case.seq_k)
    drawn, function = draw(rng, case, dtype), getattr(subquad, draw.__name__)
    if draw is eva_attention:  # these belong to chunks, not to tokens
        drawn = Drawn(drawn.inputs, {n: x for n, x in drawn.keywords.items() if n not in ("landmarks", "noise")})
    reference = getattr(importlib.import_module(f"ref.{draw.__name__}"), draw.__name__)
    expected = Expected(reference, drawn.inputs, drawn.keywords | drawn.known)
    state, outs = None, []
    with on_some_row(rng):
        for tokens in map(slice, *cut(rng, case.seq_k)):
            parts = [x[:, :, tokens] for x in drawn.inputs]
            own = {n: x[..., tokens] if n in PER_TOKEN else x for n, x in (drawn.keywords | drawn.given).items()}
            out, state = function(*parts, state=state, return_state=True, **own)
            outs.append(out)
    floor = 4 * drawn.amplified * sum_floor(largest(drawn.inputs[-1])[0])
    expected.check(np.concatenate(outs, axis=2), "out", dtype, floor, FACTOR)


PER_TOKEN = ("key_mask", "gate", "decay", "key_log_weight")


def cut(rng, length):
    """Begins and ends of a few consecutive parts, some of them empty."""
    ends = [*sorted(int(n) for n in rng.integers(0, length + 1, int(rng.integers(1, 6)))), length]
    return [0, *ends[:-1]], ends


@pytest.mark.parametrize("draw", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(CASES))
def test_random_nonsense_raises_one_clear_sentence(draw, seed):
    """Replaces some arguments of a good call by nonsense: it stays a valid call, or gives one of the four errors."""
    rng = np.random.default_rng([20_000 + seed, len(draw.__name__)])
    drawn, function = draw(rng, Case("good"), "float32"), getattr(subquad, draw.__name__)
    if rng.random() < 0.3:
        function = getattr(subquad, f"{draw.__name__}_bwd")
    parameters = inspect.signature(function).parameters
    dout = as_tuple(getattr(subquad, draw.__name__)(*drawn.inputs, **drawn.keywords, **drawn.given))[0]
    names = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    values = [dout, *drawn.inputs] if function.__name__.endswith("_bwd") else drawn.inputs
    values = [drawn.inputs[0].shape[2] if name == "seq" else x for name, x in zip(names, values, strict=False)]
    arguments = {name: p.default for name, p in parameters.items()} | dict(zip(names, values, strict=True))
    arguments |= {name: x for name, x in (drawn.keywords | drawn.given).items() if name in parameters}
    for name in rng.choice(list(arguments), rng.integers(1, 4), replace=False):
        arguments[name] = BAD_VALUES[rng.integers(len(BAD_VALUES))]
    try:
        results = function(**arguments)
        for x in results if isinstance(results, tuple) else (results,):
            assert not isinstance(x, np.ndarray) or not np.isnan(x).any()
    except (TypeError, ValueError, subquad.UnsupportedError) as error:
        assert str(error).startswith(f"[{function.__name__}] ") and "\n" not in str(error), str(error)
        assert ": expected " in str(error) and ", got " in str(error), str(error)
