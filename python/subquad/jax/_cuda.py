"""The custom call of XLA on CUDA devices.

The handler runs the same plain functions as on the CPU, on arrays of a class of our own that says where XLA's buffers
lie. They launch on XLA's stream, take their scratch memory from XLA and write into its result buffers: nothing is
copied and nothing waits.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_char_p, c_int32, c_size_t, c_void_p
from typing import Any

import jax
import numpy as np

from .._arrays import DeviceMemory, framework_by_type
from . import _ffi

_CONTEXT = _ffi.BASE | {"context": c_void_p}
_Stream = _ffi.struct("_Stream", **_CONTEXT, stream=c_void_p)
_Ordinal = _ffi.struct("_Ordinal", **_CONTEXT, ordinal=c_int32)
_Allocate = _ffi.struct("_Allocate", **_CONTEXT, size=c_size_t, alignment=c_size_t, data=c_void_p)
_Free = _ffi.struct("_Free", **_CONTEXT, size=c_size_t, data=c_void_p)
_Message = _ffi.struct("_Message", **_ffi.BASE, error=c_void_p, message=c_char_p)
_Destroy = _ffi.struct("_Destroy", **_ffi.BASE, error=c_void_p)

# The most that XLA takes. Its memory is aligned to 256 bytes, and kernels align their pieces of it themselves.
_ALIGNMENT = 16


class DeviceBuffer:
    """An array in device memory, as the compiled module takes it: strides are in elements."""

    __slots__ = ("address", "dtype", "queue", "shape", "strides")

    def __init__(self, queue: CallQueue, address: int, dtype: np.dtype[Any], shape: Any, strides: Any = None):
        self.queue, self.address, self.dtype, self.shape = queue, address, dtype, tuple(shape)
        if strides is None:
            strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        self.strides = tuple(strides)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: tuple[int, ...]) -> DeviceBuffer:
        """The item at the first axes' indices."""
        count = len(index)
        offset = sum(i * step for i, step in zip(index, self.strides, strict=False)) * self.dtype.itemsize
        return DeviceBuffer(self.queue, self.address + offset, self.dtype, self.shape[count:], self.strides[count:])

    def broadcast_to(self, shape: tuple[int, ...]) -> DeviceBuffer:
        missing = len(shape) - self.ndim
        own = zip(self.shape, self.strides, shape[missing:], strict=True)
        strides = [0] * missing + [step if n == wanted else 0 for n, step, wanted in own]
        return DeviceBuffer(self.queue, self.address, self.dtype, shape, strides)

    def merged(self, count: int) -> DeviceBuffer | None:
        """The first `count` axes as one; None where no single stride walks them."""
        shape = (math.prod(self.shape[:count]), *self.shape[count:])
        axes = [(n, step) for n, step in zip(self.shape[:count], self.strides, strict=False) if n != 1]
        one_stride = all(step == m * inner for (_, step), (m, inner) in zip(axes, axes[1:], strict=False))
        if not one_stride and shape[0]:
            return None
        return DeviceBuffer(
            self.queue, self.address, self.dtype, shape, (axes[-1][1] if axes else 0, *self.strides[count:])
        )

    def as_seed(self) -> DeviceBuffer:
        """The two halves of a seed as the 0-d integer that they are."""
        return DeviceBuffer(self.queue, self.address, np.dtype(np.int64), ())


class CallQueue:
    """Where one custom call runs: its stream and device, memory that lives until the call ends, and its results."""

    def __init__(self, frame: Any):
        self._frame = frame
        self._blocks: list[tuple[int, int]] = []
        self._unclaimed: list[DeviceBuffer] = []
        self.stream: int = self._ask("Stream_Get", _Stream).stream or 0
        self.device: int = self._ask("DeviceOrdinal_Get", _Ordinal).ordinal

    def _ask(self, name: str, kind: Any, **fields: Any) -> Any:
        question = kind(struct_size=ctypes.sizeof(kind), context=self._frame.context, **fields)
        error = _ffi.api_function(self._frame, name)(ctypes.addressof(question))
        if error:
            message = _Message(ctypes.sizeof(_Message), None, error)
            _ffi.api_function(self._frame, "Error_GetMessage", None)(ctypes.addressof(message))
            words = (message.message or b"an error").decode(errors="replace")
            destroy = _Destroy(ctypes.sizeof(_Destroy), None, error)
            _ffi.api_function(self._frame, "Error_Destroy", None)(ctypes.addressof(destroy))
            raise RuntimeError(f"[subquad.jax] {name}: expected an answer of XLA, got {words}")
        return question

    def allocate(self, size: int) -> int:
        """Device memory until the call ends. XLA hands it on to later work of the same stream only."""
        address: int = self._ask("DeviceMemory_Allocate", _Allocate, size=size, alignment=_ALIGNMENT).data or 0
        self._blocks.append((size, address))
        return address

    def free(self) -> None:
        self._unclaimed.clear()
        while self._blocks:
            size, address = self._blocks.pop()
            self._ask("DeviceMemory_Free", _Free, size=size, data=address)

    def buffers(self, buffers: Any) -> list[DeviceBuffer]:
        return [DeviceBuffer(self, address or 0, dtype, shape) for address, dtype, shape in _ffi.contents(buffers)]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceBuffer:
        """The next result of that shape and dtype (a function makes them in the order in which it returns them), or
        scratch memory."""
        for i, result in enumerate(self._unclaimed):
            if result.shape == tuple(shape) and result.dtype == dtype:
                return self._unclaimed.pop(i)
        size = math.prod(shape) * dtype.itemsize
        return DeviceBuffer(self, self.allocate(size) if size else 0, dtype, shape)

    def run(self, call: dict[str, Any], arrays: list[DeviceBuffer], results: list[DeviceBuffer]) -> None:
        given: dict[str, Any] = dict(zip(call["names"], arrays, strict=True))
        if "seed" in given:
            given["seed"] = given["seed"].as_seed()
        self._unclaimed = [*results]
        into = {"out": self._unclaimed.pop(0)} if call["takes_out"] else {}
        values = _ffi.FUNCTIONS[call["function"]](**given, **call["options"], **into)
        for result, value in zip(results, values, strict=True):
            if value is not result:
                raise RuntimeError(f"[{call['function']}] expected results in XLA's buffers, got other memory")


def _run(call: dict[str, Any], frame: Any) -> None:
    queue = CallQueue(frame)
    try:
        _ffi.execute(call, queue.buffers(frame.operands), queue.buffers(frame.results), queue.run)
    finally:
        queue.free()


framework_by_type[DeviceBuffer] = DeviceMemory
_on_cuda = _ffi.handler(_run)

# A jaxlib from before this function leaves jax to say that there is no such call on CUDA.
if "DeviceOrdinal_Get" in _ffi.API_FUNCTIONS:
    jax.ffi.register_ffi_target(_ffi.TARGET, jax.ffi.pycapsule(_on_cuda), platform="CUDA")
