"""Patterns of random bytes and random arguments: a call succeeds, or raises one clear sentence; it never crashes.

SUBQUAD_FUZZ_CASES sets the number of cases; function and seed of a failing one are in its name.
"""

import copy
import inspect
from dataclasses import fields, replace

import numpy as np
import pytest

import subquad
from ref.expand_blocks import expand_blocks
from ref.patterns import Blocks, Csr
from ref.sparse_attention import sparse_attention
from sparse_cases import masks, public, random_blocks, random_csr, random_indices
from test_errors_sparse import TABLES
from test_fuzz import BAD_VALUES, on_some_row
from test_fuzz_softmax import CASES, normal

SIZES = 2, 4, 5, 6
REFUSED = TypeError, ValueError, subquad.UnsupportedError
EDGES = [-(2**31), -2, -1, 0, 1, 5, 6, 7, 39, 40, 41, 2**16, 2**31 - 1]


def is_sentence(error, *names):
    text = str(error)
    assert any(text.startswith(f"[{name}] ") for name in names) and "\n" not in text, text
    assert isinstance(error, subquad.UnsupportedError) or (": expected " in text and ", got " in text), text


# One element of a good pattern changed: refused exactly if the pattern is no longer what it has to be


def spoil(rng, x):
    """One element set to another value, often just past a bound."""
    x = x.copy()
    if x.size:
        place = tuple(rng.integers(0, x.shape))
        x[place] = rng.choice([int(x[place]) + int(rng.integers(-2, 3)), int(rng.choice(EDGES))])
    return x


def ascends(keys):
    return (np.diff(keys.astype(np.int64)) > 0).all() and ((keys >= 0) & (keys < SIZES[3])).all()


def is_good(pattern):
    """What the docstrings of the patterns demand of values."""
    if isinstance(pattern, np.ndarray):
        return ((pattern >= -1) & (pattern < SIZES[3])).all()
    if isinstance(pattern, Csr):
        starts = pattern.indptr.astype(np.int64)
        if starts[0] != 0 or starts[-1] != len(pattern.indices) or (np.diff(starts) < 0).any():
            return False
        return all(ascends(pattern.indices[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True))
    if not ((pattern.visible >= 0) & (pattern.visible <= SIZES[3])).all():
        return False
    lengths = pattern.visible.max(axis=1)
    return pattern.positions is None or all(ascends(p[:n]) for p, n in zip(pattern.positions, lengths, strict=True))


def some_pattern(rng, seed):
    kind = seed % 4
    if kind == 0:
        return spoil(rng, random_indices(*SIZES, 7, seed))
    if kind == 1:
        csr = random_csr(*SIZES, 0.4, seed, index=[np.int32, np.int64][rng.integers(2)])
        name = str(rng.choice(["indptr", "indices"]))
        return replace(csr, **{name: spoil(rng, getattr(csr, name))})
    blocks = random_blocks(*SIZES, int(rng.integers(1, 20)), 2, 0.4, seed, **masks(2, 5, 6, kind == 3, seed=seed))
    name = str(rng.choice(["visible", "positions", "bits"] if kind == 3 else ["visible", "bits"]))
    changed = rng.integers(0, 256, blocks.bits.shape, np.uint8) if name == "bits" else spoil(rng, getattr(blocks, name))
    return replace(blocks, **{name: changed})


@pytest.mark.parametrize("seed", range(CASES))
def test_one_changed_element(seed):
    rng = np.random.default_rng([seed, 8])
    pattern = some_pattern(rng, seed)
    q, k, v, dout = normal(rng, 2, 4, 5, 3), normal(rng, 2, 2, 6, 3), normal(rng, 2, 2, 6, 3), normal(rng, 2, 4, 5, 3)
    given = public(pattern)
    calls = {
        "sparse_attention": lambda: subquad.sparse_attention(q, k, v, given),
        "sparse_attention_bwd": lambda: subquad.sparse_attention_bwd(dout, q, k, v, given),
    }
    if isinstance(pattern, Csr):
        calls["transpose_pattern"] = lambda: subquad.transpose_pattern(given)
    if isinstance(pattern, Blocks):
        calls["expand_blocks"] = lambda: subquad.expand_blocks(given)
    with on_some_row(rng):
        if is_good(pattern):
            results = {name: run() for name, run in calls.items()}
            np.testing.assert_allclose(
                results["sparse_attention"], sparse_attention(q, k, v, pattern), rtol=1e-4, atol=1e-5
            )
            if isinstance(pattern, Blocks):
                np.testing.assert_array_equal(results["expand_blocks"].indices, expand_blocks(pattern).indices)
            return
        for name, run in calls.items():
            with pytest.raises(ValueError) as caught:
                run()
            is_sentence(caught.value, name)


# Bytes of any kind


def some_bytes(rng, like):
    """An array of random bytes, or of small numbers, of the dtype and shape of `like` or of some others."""
    dtypes = [like.dtype] * 6 + [np.dtype(x) for x in ("i4", "i8", "u1", "f4", "?", "u2", "f8")]
    dtype = dtypes[rng.integers(len(dtypes))]
    shape = list(like.shape)
    if rng.random() < 0.3:
        shape[rng.integers(len(shape))] = int(rng.integers(0, 9))
    if rng.random() < 0.1:
        shape = shape[1:] if rng.random() < 0.5 else [1, *shape]
    count = int(np.prod(shape))
    if rng.random() < 0.5:
        return rng.integers(-1, 8, shape).astype(dtype)
    raw = rng.bytes(count * dtype.itemsize)
    return np.frombuffer(raw if dtype.name != "bool" else bytes(b & 1 for b in raw), dtype).reshape(shape).copy()


def some_nonsense(rng, seed):
    """A pattern of any form, some of its arrays random and some of its numbers anything."""
    good = [
        (random_indices(*SIZES, 7, seed, weighted=True)), random_csr(*SIZES, 0.4, seed, weighted=True),
        random_blocks(*SIZES, 9, 2, 0.4, seed, **masks(2, 5, 6, seed=seed)),
    ][seed % 3]  # fmt: skip
    if isinstance(good, tuple):
        return tuple(some_bytes(rng, x) if rng.random() < 0.6 else x for x in good)
    pattern = public(good)
    for field in fields(pattern):
        value = getattr(pattern, field.name)
        if rng.random() < 0.4:
            junk = BAD_VALUES[rng.integers(len(BAD_VALUES))]
            new = some_bytes(rng, value) if isinstance(value, np.ndarray) and rng.random() < 0.8 else junk
            try:
                pattern = replace(pattern, **{field.name: new})
            except ValueError as error:
                is_sentence(error, "CsrPattern")
    return pattern


@pytest.mark.parametrize("seed", range(CASES))
def test_random_bytes(seed):
    rng = np.random.default_rng([seed, 9])
    pattern = some_nonsense(rng, seed)
    q, k, dout = normal(rng, 2, 4, 5, 3), normal(rng, 2, 2, 6, 3), normal(rng, 2, 4, 5, 3)
    repr(pattern)
    with on_some_row(rng):
        for name, arguments in {
            "sparse_attention": (q, k, k, pattern),
            "sparse_attention_bwd": (dout, q, k, k, pattern),
            "expand_blocks": (pattern,),
            "transpose_pattern": (pattern,),
        }.items():
            try:
                getattr(subquad, name)(*arguments)
            except REFUSED as error:
                is_sentence(error, name)


# Any argument of any function


MORE_VALUES = [*BAD_VALUES, 1, 2, 1.5, np.inf, np.nan, -0.0, 1e-300, np.int64(3), "query", "head", "paper", False,
               np.zeros((2, 4, 5, 6), "i4"), np.ones((2, 6), bool), (None, None), (1, 2, 3, 4, 5),
               np.empty((2, 4, 0, 3), "f4"), np.ones((2, 4, 5, 16), "f4")[..., ::2]]  # fmt: skip


@pytest.mark.parametrize("key", [key for key in TABLES if key != "CsrPattern"])
@pytest.mark.parametrize("seed", range(max(1, CASES // 5)))
def test_random_nonsense_raises_one_clear_sentence(key, seed):
    """Replaces some arguments of a good call by nonsense: it stays a valid call, or gives one of the three errors."""
    rng = np.random.default_rng([seed, len(key), 10])
    function, base = getattr(subquad, key.split()[0]), copy.copy(TABLES[key][0])
    if "pattern" in inspect.signature(function).parameters and "pattern" not in base:
        base["pattern"] = TABLES["sparse_attention"][0]["pattern"]
    arguments = {name: p.default for name, p in inspect.signature(function).parameters.items()} | base
    for name in rng.choice(list(arguments), min(len(arguments), rng.integers(1, 4)), replace=False):
        arguments[name] = MORE_VALUES[rng.integers(len(MORE_VALUES))]
        if name == "weights" and rng.random() < 0.7:
            weight = str(rng.choice(list(base["weights"])))
            arguments[name] = base["weights"] | {weight: MORE_VALUES[rng.integers(len(MORE_VALUES))]}
    try:
        function(**arguments)
    except REFUSED as error:
        is_sentence(error, function.__name__)
