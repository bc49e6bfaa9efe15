"""Plain functions of the library as one custom call of XLA on the CPU.

XLA calls handlers through a C interface of versioned structs (xla/ffi/api/c_api.h, version 0.x). They are declared here
with ctypes, so that nothing is compiled against a jaxlib and any jaxlib with that interface serves. The handler sees
XLA's own buffers: operands are not copied, and no thread of XLA waits for another. jax.pure_callback copies operands on
XLA's threads, and can hang where as many computations that wait for copies are under way as there are threads.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import jax
import ml_dtypes
import numpy as np

TARGET = "subquad"

# The plain functions that a call may name. They take every array and option by keyword.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def _struct(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_BASE = {"struct_size": c_size_t, "extension_start": c_void_p}
_Version = _struct("_Version", **_BASE, major_version=c_int, minor_version=c_int)
_Api = _struct("_Api", **_BASE, api_version=_Version, internal_api=c_void_p, error_create=c_void_p)
_Error = _struct("_Error", **_BASE, message=c_char_p, code=c_int)
_Metadata = _struct("_Metadata", struct_size=c_size_t, api_version=_Version, traits=c_uint32)
_Extension = _struct("_Extension", struct_size=c_size_t, type=c_int, next=c_void_p, metadata=POINTER(_Metadata))
_Buffer = _struct("_Buffer", **_BASE, dtype=c_int, data=c_void_p, rank=c_int64, dims=POINTER(c_int64))
_Buffers = _struct("_Buffers", **_BASE, size=c_int64, types=c_void_p, items=POINTER(POINTER(_Buffer)))
_Span = _struct("_Span", data=c_void_p, size=c_size_t)
_Attributes = _struct(
    "_Attributes", **_BASE, size=c_int64, types=c_void_p, names=POINTER(POINTER(_Span)), items=POINTER(POINTER(_Span))
)
_CallFrame = _struct(
    "_CallFrame", struct_size=c_size_t, extension_start=POINTER(_Extension), api=POINTER(_Api), context=c_void_p,
    stage=c_int, operands=_Buffers, results=_Buffers, attributes=_Attributes,
)  # fmt: skip


def _minor_version() -> int:
    """That of the interface of the installed jaxlib, whose headers name it. A handler of another version must not be
    registered: jax then refuses to run anything on the CPU."""
    if not hasattr(jax, "ffi"):
        raise ImportError(f"[subquad.jax] jax: expected version 0.5 or later, which has jax.ffi, got {jax.__version__}")
    header = (pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (int(n) for n in re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header))
    if major != 0:
        raise ImportError(
            f"[subquad.jax] jax: expected version 0.x of its interface for custom calls, got {major}.{minor}"
        )
    return minor


_MINOR_VERSION = _minor_version()
_EXTENSION_METADATA = 1
_ERROR_INTERNAL = 13
_DTYPES = {
    1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.uint8, 7: np.uint16, 8: np.uint32,
    9: np.uint64, 10: np.float16, 11: np.float32, 16: ml_dtypes.bfloat16,
}  # fmt: skip


def _views(buffers: Any, writable: bool) -> list[np.ndarray]:
    views = []
    for i in range(buffers.size):
        buffer = buffers.items[i].contents
        dtype, shape = np.dtype(_DTYPES[buffer.dtype]), tuple(buffer.dims[: buffer.rank])
        size_bytes = math.prod(shape) * dtype.itemsize
        if size_bytes == 0:
            view = np.empty(shape, dtype)
        else:
            view = np.frombuffer((ctypes.c_char * size_bytes).from_address(buffer.data), dtype).reshape(shape)
        view.flags.writeable = writable
        views.append(view)
    return views


def plain(function: str, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """Calls a plain function; a seed may be any 0-d integer array. Always a tuple."""
    if "seed" in arrays:
        arrays = arrays | {"seed": int(arrays["seed"])}
    results = FUNCTIONS[function](**arrays, **options)
    return results if isinstance(results, tuple) else (results,)


@functools.lru_cache(maxsize=1024)
def _parsed(call: bytes) -> dict[str, Any]:
    return json.loads(call)


def _execute(call: dict[str, Any], operands: list[np.ndarray], results: list[np.ndarray]) -> None:
    """Runs a call whose operands may have further leading axes of vmap, of extent 1 where vmap does not map them.

    Axes that only arguments with a batch axis have are folded into it: draws do not depend on the batch, so that
    nothing changes but the shape. Over an argument without a batch axis (a seed, planes) the call is repeated.
    """
    leads = [x.shape[: x.ndim - rank] for x, rank in zip(operands, call["ranks"], strict=True)]
    lead = np.broadcast_shapes(*leads)
    placed = list(zip(call["names"], operands, leads, strict=True))
    if not lead:
        _write(call, operands, results)
    elif all(name in call["batched"] or math.prod(own) == 1 for name, _, own in placed):
        folded = []
        for name, x, own in placed:
            inner = x.shape[len(own) :]
            if name in call["batched"]:
                x, inner = np.broadcast_to(x, lead + inner), (math.prod(lead) * inner[0], *inner[1:])
            folded.append(x.reshape(inner))
        last = len(lead) + 1
        _write(call, folded, [y.reshape((math.prod(y.shape[:last]), *y.shape[last:])) for y in results])
    else:
        for index in np.ndindex(lead):
            items = [x[tuple(min(i, n - 1) for i, n in zip(index, own, strict=True))] for _, x, own in placed]
            _write(call, items, [y[index] for y in results])


def _write(call: dict[str, Any], arrays: list[np.ndarray], results: list[np.ndarray]) -> None:
    into = {"out": results[0]} if call["takes_out"] else {}
    values = plain(call["function"], dict(zip(call["names"], arrays, strict=True)), call["options"] | into)
    for result, value in zip(results, values, strict=True):
        if value is not result:
            result[...] = value


def _error(frame: Any, message: str) -> int:
    error = _Error(ctypes.sizeof(_Error), None, message.encode(), _ERROR_INTERNAL)
    return ctypes.CFUNCTYPE(c_void_p, c_void_p)(frame.api.contents.error_create)(ctypes.addressof(error))


@ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))
def _handler(pointer: Any) -> int | None:
    frame = pointer.contents
    try:
        if frame.extension_start and frame.extension_start.contents.type == _EXTENSION_METADATA:
            # Minor versions only append fields, so that this code serves all of them.
            version = frame.extension_start.contents.metadata.contents.api_version
            version.major_version, version.minor_version = 0, _MINOR_VERSION
            return None
        text = frame.attributes.items[0].contents
        description = _parsed(ctypes.string_at(text.data, text.size))
        _execute(description, _views(frame.operands, writable=False), _views(frame.results, writable=True))
        return None
    except BaseException as error:  # none may pass through XLA's frames
        return _error(frame, str(error) or type(error).__name__)


def call(
    function: str,
    arrays: dict[str, Any],
    options: dict[str, Any],
    results: list[jax.ShapeDtypeStruct],
    *,
    batched: set[str],
    takes_out: bool,
) -> tuple[Any, ...]:
    """`plain` as part of a computation that jax traces.

    batched: the arguments whose first axis is the batch; every result has it too.
    takes_out: whether the function writes its first result into an argument `out`.
    """
    description = {
        "function": function,
        "names": list(arrays),
        "ranks": [np.ndim(x) for x in arrays.values()],
        "batched": sorted(batched & set(arrays)),
        "options": options,
        "takes_out": takes_out,
    }
    operation = jax.ffi.ffi_call(TARGET, tuple(results), vmap_method="expand_dims")
    return tuple(operation(*arrays.values(), call=json.dumps(description)))


jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_handler), platform="cpu")
