"""Plain functions of the library as one custom call of XLA.

XLA calls handlers through a C interface of versioned structs (xla/ffi/api/c_api.h, version 0.x). They are declared here
with ctypes, so that nothing is compiled against a jaxlib and any jaxlib with that interface serves. The handlers see
XLA's own buffers: operands are not copied, and no thread of XLA waits for another. The one for the CPU is here, that
for CUDA devices in _cuda.py. jax.pure_callback copies operands on XLA's threads, and can hang where as many
computations that wait for copies are under way as there are threads.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import jax
import ml_dtypes
import numpy as np

TARGET = "subquad"

# The plain functions that a call may name. They take every array and option by keyword.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def struct(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _interface() -> tuple[int, list[str]]:
    """The minor version of the interface of the installed jaxlib, and the functions of its table in their order: its
    header names them. A handler of another version must not be registered: jax then refuses to run anything."""
    if not hasattr(jax, "ffi"):
        raise ImportError(f"[subquad.jax] jax: expected version 0.5 or later, which has jax.ffi, got {jax.__version__}")
    header = (pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (int(n) for n in re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header))
    if major != 0:
        raise ImportError(
            f"[subquad.jax] jax: expected version 0.x of its interface for custom calls, got {major}.{minor}"
        )
    return minor, re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\);", header)


_MINOR_VERSION, API_FUNCTIONS = _interface()
BASE = {"struct_size": c_size_t, "extension_start": c_void_p}
_Version = struct("_Version", **BASE, major_version=c_int, minor_version=c_int)
_Api = struct(
    "_Api", **BASE, api_version=_Version, internal_api=c_void_p, **dict.fromkeys(API_FUNCTIONS, c_void_p)
)  # fmt: skip
_Error = struct("_Error", **BASE, message=c_char_p, code=c_int)
_Metadata = struct("_Metadata", struct_size=c_size_t, api_version=_Version, traits=c_uint32)
_Extension = struct("_Extension", struct_size=c_size_t, type=c_int, next=c_void_p, metadata=POINTER(_Metadata))
_Buffer = struct("_Buffer", **BASE, dtype=c_int, data=c_void_p, rank=c_int64, dims=POINTER(c_int64))
_Buffers = struct("_Buffers", **BASE, size=c_int64, types=c_void_p, items=POINTER(POINTER(_Buffer)))
_Span = struct("_Span", data=c_void_p, size=c_size_t)
_Attributes = struct(
    "_Attributes", **BASE, size=c_int64, types=c_void_p, names=POINTER(POINTER(_Span)), items=POINTER(POINTER(_Span))
)
CallFrame = struct(
    "CallFrame", struct_size=c_size_t, extension_start=POINTER(_Extension), api=POINTER(_Api), context=c_void_p,
    stage=c_int, operands=_Buffers, results=_Buffers, attributes=_Attributes,
)  # fmt: skip


_EXTENSION_METADATA = 1
_ERROR_INTERNAL = 13
_DTYPES = {
    1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.uint8, 7: np.uint16, 8: np.uint32,
    9: np.uint64, 10: np.float16, 11: np.float32, 16: ml_dtypes.bfloat16,
}  # fmt: skip


def contents(buffers: Any) -> Iterator[tuple[int, np.dtype[Any], tuple[int, ...]]]:
    """Address (None or anything if it is empty), dtype and shape of each operand or result."""
    for i in range(buffers.size):
        buffer = buffers.items[i].contents
        yield buffer.data, np.dtype(_DTYPES[buffer.dtype]), tuple(buffer.dims[: buffer.rank])


def _views(buffers: Any, writable: bool) -> list[np.ndarray]:
    views = []
    for address, dtype, shape in contents(buffers):
        size_bytes = math.prod(shape) * dtype.itemsize
        if size_bytes == 0:
            view = np.empty(shape, dtype)
        else:
            memory: Any = (ctypes.c_char * size_bytes).from_address(address)
            view = np.frombuffer(memory, dtype).reshape(shape)
        view.flags.writeable = writable
        views.append(view)
    return views


def plain(function: str, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """Calls a plain function; a seed may be any 0-d integer array. Always a tuple."""
    if "seed" in arrays:
        arrays = arrays | {"seed": int(arrays["seed"])}
    return FUNCTIONS[function](**arrays, **options)


@functools.lru_cache(maxsize=1024)
def _parsed(call: bytes) -> dict[str, Any]:
    return json.loads(call)


def _merged(x: Any, count: int) -> Any:
    """`x` with its first `count` axes as one; None for device memory whose strides do not allow it."""
    if not isinstance(x, np.ndarray):
        return x.merged(count)
    return x.reshape((math.prod(x.shape[:count]), *x.shape[count:]))


def _folded(x: Any, own: int, lead: tuple[int, ...], is_batched: bool) -> Any:
    """`x`, which has `own` leading axes, with all of `lead` in its batch, or without them if it has no batch."""
    if not is_batched:
        return x[(0,) * own]
    shape = lead + x.shape[own:]
    return _merged(np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else x.broadcast_to(shape), len(lead) + 1)


def execute(call: dict[str, Any], operands: list[Any], results: list[Any], run: Callable[..., None]) -> None:
    """Runs a call whose operands may have further leading axes of vmap, of extent 1 where vmap does not map them.
    `run(call, arrays, results)` runs it without such axes.

    Axes that only arguments with a batch axis have are folded into it: draws do not depend on the batch, so that
    nothing changes but the shape. Over an argument without a batch axis (a seed, planes) the call is repeated.
    """
    leads = [x.shape[: x.ndim - rank] for x, rank in zip(operands, call["ranks"], strict=True)]
    lead = np.broadcast_shapes(*leads)
    if not lead:
        return run(call, operands, results)
    placed = list(zip(call["names"], operands, leads, strict=True))
    if all(name in call["batched"] or math.prod(own) == 1 for name, _, own in placed):
        folded = [_folded(x, len(own), lead, name in call["batched"]) for name, x, own in placed]
        if all(x is not None for x in folded):
            return run(call, folded, [_merged(y, len(lead) + 1) for y in results])
    for index in np.ndindex(lead):
        items = [x[tuple(min(i, n - 1) for i, n in zip(index, own, strict=True))] for _, x, own in placed]
        run(call, items, [y[index] for y in results])


def _run(call: dict[str, Any], arrays: list[np.ndarray], results: list[np.ndarray]) -> None:
    given = dict(zip(call["names"], arrays, strict=True))
    if "seed" in given:
        given["seed"] = given["seed"].view(np.int64)[0]
    into = {"out": results[0]} if call["takes_out"] else {}
    for result, value in zip(results, plain(call["function"], given, call["options"] | into), strict=True):
        if value is not result:
            result[...] = value


def _run_on_cpu(call: dict[str, Any], frame: Any) -> None:
    execute(call, _views(frame.operands, writable=False), _views(frame.results, writable=True), _run)


def api_function(frame: Any, name: str, result: Any = c_void_p) -> Callable[[int], Any]:
    """A function of XLA, which takes the address of a struct."""
    return ctypes.CFUNCTYPE(result, c_void_p)(getattr(frame.api.contents, name))


def _error(frame: Any, message: str) -> int:
    error = _Error(ctypes.sizeof(_Error), None, message.encode(), _ERROR_INTERNAL)
    return api_function(frame, "Error_Create")(ctypes.addressof(error))


def handler(run: Callable[[dict[str, Any], Any], None]) -> Any:
    """What XLA calls: `run(call, frame)` between the words of its interface."""

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        try:
            if frame.extension_start and frame.extension_start.contents.type == _EXTENSION_METADATA:
                # Minor versions only append fields, so that this code serves all of them. The plugin of a device may be
                # older than the jaxlib beside it.
                own = frame.api.contents.api_version.minor_version if frame.api else _MINOR_VERSION
                version = frame.extension_start.contents.metadata.contents.api_version
                version.major_version, version.minor_version = 0, min(own, _MINOR_VERSION)
                return None
            text = frame.attributes.items[0].contents
            run(_parsed(ctypes.string_at(text.data, text.size)), frame)
            return None
        except BaseException as error:  # none may pass through XLA's frames
            return _error(frame, str(error) or type(error).__name__)

    return ctypes.CFUNCTYPE(c_void_p, POINTER(CallFrame))(handle)


def _seed_words(seed: Any) -> Any:
    """The 64 bits of a seed as two integers, the low half first: kernels read 64 bits, which jax may not have."""
    if seed.dtype.itemsize < 8:
        low = seed.astype(np.int32 if jax.numpy.issubdtype(seed.dtype, np.signedinteger) else np.uint32)
        return jax.numpy.stack([low, low >> 31 if low.dtype == np.int32 else low ^ low])
    return jax.lax.bitcast_convert_type(seed, np.uint32)


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
    if "seed" in arrays:
        arrays = arrays | {"seed": _seed_words(arrays["seed"])}
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


_on_cpu = handler(_run_on_cpu)
jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_on_cpu), platform="cpu")
