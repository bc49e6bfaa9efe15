"""Random shapes, strides, dtypes and options: no crash, no NaN, no mismatch with the reference.

SUBQUAD_FUZZ_CASES sets the number of cases; the seed of a failing one is in its name.
"""

import contextlib
import os

import numpy as np
import pytest

import subquad
from cases import Case, arrays, as_dtype, strided
from ref import yoso_attention as ref
from test_yoso_attention import library_codes
from tolerance import assert_budget, redrawn_floor, round_to

CASES = int(os.environ.get("SUBQUAD_FUZZ_CASES", "150"))


def draw_case(rng, tokens=90, dims=140):
    heads_kv = int(rng.integers(1, 4))
    small = lambda high: int(rng.choice([1, 2, 3, int(rng.integers(1, high))]))  # noqa: E731
    return Case(
        "fuzz",
        batch=int(rng.integers(1, 4)),
        heads=heads_kv * int(rng.integers(1, 4)),
        heads_kv=heads_kv,
        seq_q=small(tokens),
        seq_k=small(tokens),
        dim=small(dims),
        dim_v=small(dims),
        causal=bool(rng.integers(2)),
        masked=bool(rng.integers(2)),
    )


def draw_keywords(rng):
    expectation = rng.random() < 0.25
    grads = ["exact", "lower_bound"] + ([] if expectation else ["sampled", "sampled_exact"])
    return dict(
        num_hashes=int(rng.choice([1, 2, 5, 17, 40])),
        hash_bits=int(rng.integers(1, 25)),
        hashing=str(rng.choice(["hadamard", "gaussian"])),
        carving=str(rng.choice(["strided", "published"])),
        expectation=bool(expectation),
        normalize=bool(rng.random() < 0.8),
        seed=int(rng.integers(-(2**62), 2**62)),
        grad=str(rng.choice(grads)),
    )


def layout(x, rng):
    """The same values at other strides."""
    kind = rng.integers(4)
    if kind == 1:
        return strided(x)
    if kind == 2:
        return np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    if kind == 3:
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    return x


def some_dtype(rng):
    dtype = str(rng.choice(["float32", "float32", "float16", "bfloat16"]))
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    return dtype


@contextlib.contextmanager
def on_some_row(rng):
    """A body that runs on one row of kernels that this machine has."""
    before = subquad.cpu.isa()
    subquad.cpu.set_isa(str(rng.choice(subquad.cpu.available())))
    try:
        yield
    finally:
        subquad.cpu.set_isa(before)


@pytest.mark.parametrize("seed", range(CASES))
def test_random_calls(seed):
    rng = np.random.default_rng(seed)
    case, keywords = draw_case(rng), draw_keywords(rng)
    dtype = some_dtype(rng)
    with on_some_row(rng):
        check(case, keywords, dtype, seed, rng)


def check(case, keywords, dtype, seed, rng):
    q, k, v, masks = arrays(case, seed, dtype)
    codes = library_codes(q, k, keywords)
    out = subquad.yoso_attention(layout(q, rng), layout(k, rng), layout(v, rng), **keywords, **masks)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    compare("out", (out,), ref.yoso_attention, wide, keywords | masks, codes, dtype)
    dout = as_dtype(rng.standard_normal(out.shape), dtype)
    got = subquad.yoso_attention_bwd(
        layout(dout, rng), layout(q, rng), layout(k, rng), layout(v, rng), **keywords, **masks
    )
    compare("dq dk dv", got, ref.yoso_attention_bwd, [dout.astype(np.float64), *wide], keywords | masks, codes, dtype)


def compare(names, got, reference, wide, keywords, codes, dtype):
    exact = reference(*wide, **keywords, codes=codes)
    plain = reference(*wide, **keywords, codes=codes, dtype=np.float32)
    *dout, q, k, v = wide
    again = lambda q, k: reference(*dout, q, k, v, **keywords, codes=codes, dtype=np.float32)  # noqa: E731
    floors = redrawn_floor(again, q, k, exact, gradients=(0, 1) if dout else None)
    exact, plain = ((x if isinstance(x, tuple) else (x,)) for x in (exact, plain))
    for name, actual, truth, rounded, floor in zip(names.split(), got, exact, plain, floors, strict=True):
        actual = np.asarray(actual, np.float32)
        assert not np.isnan(actual).any()
        assert_budget(actual, truth, round_to(rounded, dtype), dtype=dtype, floor=floor, what=name)


BAD_VALUES = [
    None,
    -1,
    0,
    3.5,
    "x",
    True,
    [],
    {},
    np.float64(2),
    2**70,
    b"ab",
    np.ones(3),
    np.ones((1, 2, 3), "f4"),
    object(),
]


@pytest.mark.parametrize("seed", range(CASES))
def test_random_nonsense_raises_one_clear_sentence(seed):
    """Replaces some arguments of a good call by nonsense: it stays a valid call, or gives one of the four errors."""
    rng = np.random.default_rng(10_000 + seed)
    q, k, v, _ = arrays(Case("good"), seed)
    arguments = dict(q=q, k=k, v=v, num_hashes=3, hash_bits=4, hashing="hadamard", carving="strided", planes=None,
                     signs=None, expectation=False, key_mask=None, query_mask=None, is_causal=False, normalize=True,
                     seed=0, grad=None, out=None)  # fmt: skip
    for name in rng.choice(list(arguments), rng.integers(1, 4), replace=False):
        arguments[name] = BAD_VALUES[rng.integers(len(BAD_VALUES))]
    positional = [arguments.pop(name) for name in ("q", "k", "v")]
    try:
        result = subquad.yoso_attention(*positional, **arguments)
        assert not np.isnan(result).any()
    except (TypeError, ValueError, subquad.UnsupportedError) as error:
        assert str(error).startswith("[yoso_attention] ") and "\n" not in str(error), str(error)
