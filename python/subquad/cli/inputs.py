"""The q, k and v that a comparison runs on: the built-in sample, or arrays of a file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from subquad.data import load_sample

from .console import UserError

Array = NDArray[Any]
DTYPES = ("float32", "float16", "bfloat16")
MAX_DIM = 512
_NAMES = ("q", "k", "v")
_AXES = {"q": "[B, H, N, D]", "k": "[B, Hkv, M, D]", "v": "[B, Hkv, M, E]"}


class Inputs(NamedTuple):
    q: Array
    k: Array
    v: Array
    source: str


def load_inputs(path: str | None, seq: int | None, dtype: str | None) -> Inputs:
    """C-contiguous q, k, v of one dtype, checked.

    path: a .npz or .safetensors file; None for the built-in sample. seq: take the first tokens only.
    dtype: convert; None keeps that of the file. UserError says what cannot be used and how to mend it.
    """
    if path is None:
        source, arrays = "built-in sample", _sample(seq)
    else:
        source, arrays = path, _read(path)
        _check(arrays, dtype is not None)
        if seq is not None:
            arrays = _first(arrays, seq)
    wanted = _numpy_dtype(dtype or ("float32" if path is None else arrays["q"].dtype.name))
    with np.errstate(over="ignore"):  # what overflows is refused below
        q, k, v = (np.array(arrays[name], wanted, order="C") for name in _NAMES)
    for name, x in zip(_NAMES, (q, k, v), strict=True):
        bad = int(x.size - np.isfinite(x).sum())
        if bad:
            raise UserError(f"{name}: expected finite values, got {bad} NaN or infinite of {x.size} as {wanted.name}")
    return Inputs(q, k, v, source)


def _sample(seq: int | None) -> dict[str, Array]:
    try:
        sample = load_sample(seq)
    except ValueError as error:
        raise UserError(f"--seq: the built-in sample is too short: {str(error).split(': ', 1)[1]}") from None
    return {"q": sample.q, "k": sample.k, "v": sample.v}


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise UserError(f"bfloat16 needs ml_dtypes ({error}): pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def _read(path: str) -> dict[str, Array]:
    if not Path(path).is_file():
        raise UserError(f"--input: no such file: {path}")
    kind = Path(path).suffix.lower()
    if kind == ".npz":
        return _read_npz(path)
    if kind == ".safetensors":
        return _read_safetensors(path)
    raise UserError(f"--input: expected a .npz or .safetensors file with arrays q, k, v, got {path}")


def _pick(path: str, names: list[str]) -> None:
    missing = [name for name in _NAMES if name not in names]
    if missing:
        found = ", ".join(sorted(names)[:12]) or "none"
        raise UserError(f"--input: expected arrays q, k, v in {path}, got no {', '.join(missing)} (found: {found})")


def _read_npz(path: str) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            _pick(path, list(stored.files))
            return {name: stored[name] for name in _NAMES}
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"--input: cannot read {path}: {error}") from None
    except Exception:  # what numpy and zlib raise for a damaged file is theirs, and no help to anybody
        raise UserError(f"--input: cannot read {path}: expected an .npz archive of plain arrays") from None


def _read_safetensors(path: str) -> dict[str, Array]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"--input: .safetensors needs the package ({error}): pip install safetensors") from None
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  (from then on numpy knows the name bfloat16)
    try:
        with safe_open(path, framework="numpy") as stored:
            _pick(path, list(stored.keys()))
            return {name: stored.get_tensor(name) for name in _NAMES}
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"--input: cannot read {path}: {error}") from None
    except (SafetensorError, TypeError, AttributeError) as error:  # the latter for dtypes that numpy does not have
        raise UserError(f"--input: cannot read {path} as .safetensors: {error}") from None


def _check(arrays: dict[str, Array], converted: bool) -> None:
    """The rules of the library for shapes and dtypes, said before any work is done."""
    for name, x in arrays.items():
        wrong_shape = f"{name}: expected shape {_AXES[name]}, got {list(x.shape)}"
        if x.ndim == 3:
            raise UserError(f"{wrong_shape}: add the batch axis, {name}[None]")
        if x.ndim != 4:
            raise UserError(wrong_shape)
        if 0 in x.shape:
            raise UserError(f"{name}: expected at least one element, got shape {list(x.shape)}")
        if x.shape[3] > MAX_DIM:
            raise UserError(f"{name}: expected a last axis of 1..{MAX_DIM}, got {x.shape[3]}")
        if x.dtype.name not in (*DTYPES, "float64"):
            raise UserError(f"{name}: expected {', '.join(DTYPES)}, got {_dtype_words(x.dtype)}")
        if x.dtype.name == "float64" and not converted:
            raise UserError(f"{name}: expected {', '.join(DTYPES)}, got float64: convert it with --dtype float32")
    q, k, v = (arrays[name] for name in _NAMES)
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]:
        raise UserError(
            f"k: expected shape [B, Hkv, M, D] = [{batch}, a divisor of {heads}, M, {dim}], got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        expected = ", ".join(str(n) for n in k.shape[:3])
        raise UserError(f"v: expected shape [B, Hkv, M, E] = [{expected}, E], got {list(v.shape)}")
    if not converted and len({x.dtype.name for x in (q, k, v)}) > 1:
        found = ", ".join(f"{name} {x.dtype.name}" for name, x in arrays.items())
        raise UserError(f"expected one dtype for q, k and v, got {found}: convert them with --dtype")


def _dtype_words(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "V":
        return f"{dtype.str}: .npz does not keep bfloat16; store float32 and give --dtype bfloat16, or use .safetensors"
    return str(dtype.name)


def _first(arrays: dict[str, Array], seq: int) -> dict[str, Array]:
    tokens = {x.shape[2] for x in arrays.values()}
    if len(tokens) > 1:
        raise UserError(f"--seq: expected as many keys as queries, got {' and '.join(map(str, sorted(tokens)))}")
    (available,) = tokens
    if seq > available:
        raise UserError(f"--seq: expected 1..{available}, the tokens in the file, got {seq}")
    return {name: x[:, :, :seq] for name, x in arrays.items()}
