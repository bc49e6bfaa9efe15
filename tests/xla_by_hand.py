"""XLA's side of a custom call on a CUDA device, played by ctypes: device memory is memory of the host."""

import ctypes

import jax
import numpy as np

from subquad import _ext
from subquad.jax import _cuda, _ffi

STREAM, DEVICE = 0x5500, 3


def on_host(x):
    """What the stand-in sees of an argument: device memory as a numpy array."""
    if isinstance(x, dict):
        return {name: on_host(value) for name, value in x.items()}
    if not isinstance(x, _cuda.DeviceBuffer):
        return x
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)) if 0 not in x.shape else 0
    raw = (ctypes.c_char * (span * x.dtype.itemsize)).from_address(x.address) if span else b""
    steps = [step * x.dtype.itemsize for step in x.strides]
    return np.lib.stride_tricks.as_strided(np.frombuffer(raw, x.dtype), x.shape, steps) if span else np.empty(x.shape)


class Module:
    """The compiled module, as if its kernels ran on host memory."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments):
            buffers = [x for x in arguments if isinstance(x, _cuda.DeviceBuffer)]
            if not buffers:
                return getattr(_ext, name)(*arguments)
            for x in buffers:
                _, shape, strides, device, address = _ext._describe(x)
                assert device == f"cuda:{DEVICE}" and shape == x.shape
                assert address == (x.address if 0 not in x.shape else 0)
            assert _ext._resources(buffers[0])[:2] == (f"cuda:{DEVICE}", STREAM)
            self.calls.append((name, arguments))
            return getattr(_ext, name)(*map(on_host, arguments))

        return call


def buffer_of(x):
    queue = type("Queue", (), {"stream": STREAM, "device": DEVICE})()
    return _cuda.DeviceBuffer(queue, x.ctypes.data, x.dtype, x.shape)


Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class Xla:
    """A call frame, and the functions of XLA that a handler may call."""

    def __init__(self, operands, results, description, fail=None):
        self.fail, self.errors, self.held, self.freed, self.alive = fail, {}, {}, [], []
        api = _ffi._Api()
        for name in ("Stream_Get", "DeviceOrdinal_Get", "DeviceMemory_Allocate", "DeviceMemory_Free"):
            self.provide(api, name, self.answer(name))
        self.provide(api, "Error_Create", lambda address: self.error(_ffi._Error.from_address(address).message))
        self.provide(api, "Error_GetMessage", self.tell)
        self.provide(api, "Error_Destroy", lambda at: self.errors.pop(_cuda._Destroy.from_address(at).error) and None)
        self.frame = _ffi.CallFrame(api=ctypes.pointer(api), context=0xC0, operands=self.buffers(operands))
        self.frame.results = self.buffers(results)
        text = ctypes.create_string_buffer(description.encode())
        span = _ffi._Span(ctypes.addressof(text), len(description))
        items = (ctypes.POINTER(_ffi._Span) * 1)(ctypes.pointer(span))
        self.frame.attributes = _ffi._Attributes(size=1, items=items)
        self.alive += [api, text, span, items]

    def provide(self, api, name, function):
        wrapped = Function(function)
        self.alive.append(wrapped)
        setattr(api, name, ctypes.cast(wrapped, ctypes.c_void_p))

    def error(self, message):
        address = 0xE000 + len(self.errors)
        self.errors[address] = message
        return address

    def tell(self, address):
        _cuda._Message.from_address(address).message = self.errors[_cuda._Message.from_address(address).error]

    def answer(self, name):
        def stream_get(address):
            _cuda._Stream.from_address(address).stream = STREAM

        def ordinal_get(address):
            _cuda._Ordinal.from_address(address).ordinal = DEVICE

        def allocate(address):
            question = _cuda._Allocate.from_address(address)
            assert question.alignment == 16
            memory = np.empty(question.size, np.uint8)
            question.data = memory.ctypes.data
            self.held[question.data] = memory

        def free(address):
            question = _cuda._Free.from_address(address)
            assert self.held.pop(question.data).size == question.size
            self.freed.append(question.size)

        play = dict(zip(("Stream_Get", "DeviceOrdinal_Get", "DeviceMemory_Allocate", "DeviceMemory_Free"),
                        (stream_get, ordinal_get, allocate, free), strict=True))  # fmt: skip

        def called(address):
            assert _cuda._Stream.from_address(address).context == 0xC0
            assert _cuda._Stream.from_address(address).struct_size >= 28
            if self.fail == name:
                return self.error(b"not today")
            return play[name](address)

        return called

    def buffers(self, arrays):
        codes = {np.dtype(dtype): code for code, dtype in _ffi._DTYPES.items()}
        pointers = (ctypes.POINTER(_ffi._Buffer) * len(arrays))()
        for i, x in enumerate(arrays):
            dims = (ctypes.c_int64 * x.ndim)(*x.shape)
            buffer = _ffi._Buffer(dtype=codes[x.dtype], data=x.ctypes.data, rank=x.ndim, dims=dims)
            self.alive += [x, dims, buffer]
            pointers[i] = ctypes.pointer(buffer)
        self.alive.append(pointers)
        return _ffi._Buffers(size=len(arrays), items=pointers)

    def run(self):
        """The message of the error that the handler returns, or None."""
        error = _cuda._on_cuda(ctypes.pointer(self.frame))
        assert not self.held, "scratch memory is given back"
        return None if error is None else self.errors.pop(error).decode()


class HostQueue(_cuda.CallQueue):
    def _ask(self, name, kind, **fields):
        answer = kind()
        if name == "Stream_Get":
            answer.stream = STREAM
        elif name == "DeviceOrdinal_Get":
            answer.ordinal = DEVICE
        elif name == "DeviceMemory_Allocate":
            self.memory = np.empty(fields["size"], np.uint8)
            answer.data = self.memory.ctypes.data
        return answer


def _run_on_host(call, frame):
    queue = HostQueue(frame)
    _ffi.execute(call, queue.buffers(frame.operands), queue.buffers(frame.results), queue.run)


HOST_TARGET = "subquad_on_host_as_on_a_device"
_on_host = _ffi.handler(_run_on_host)
jax.ffi.register_ffi_target(HOST_TARGET, jax.ffi.pycapsule(_on_host), platform="cpu")
