"""Outputs in the caller's own array type: the only module that knows how each framework makes an empty array."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
_ALIGNMENT = 64  # jax takes a numpy buffer without a copy only at this alignment


class Numpy:
    """numpy arrays; bfloat16 by ml_dtypes."""

    @staticmethod
    def enter(x: Array) -> Array:
        return x

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: str | None, like: Array) -> Array:
        return np.empty(shape, like.dtype if dtype is None else dtype)

    @staticmethod
    def leave(x: Array) -> Array:
        return x

    @staticmethod
    def broadcast(x: Array, shape: tuple[int, ...]) -> Array:
        return np.broadcast_to(x, shape)

    @staticmethod
    def concatenate(parts: list[Array], axis: int = 2) -> Array:
        """The parts one behind the other, in an array of their own."""
        return np.ascontiguousarray(np.concatenate(parts, axis))

    @staticmethod
    def ones(shape: tuple[int, ...], like: Array) -> Array:
        """A mask that keeps everything."""
        return np.ones(shape, bool)

    @staticmethod
    def mark_written(x: Array) -> None:
        """Tells the framework that `x` is about to be written behind its back."""


class Torch(Numpy):
    @staticmethod
    def empty(shape: tuple[int, ...], dtype: str | None, like: Array) -> Array:
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=like.dtype if dtype is None else getattr(torch, dtype), device=like.device)

    @staticmethod
    def broadcast(x: Array, shape: tuple[int, ...]) -> Array:
        return x.expand(shape)

    @staticmethod
    def concatenate(parts: list[Array], axis: int = 2) -> Array:
        return sys.modules["torch"].cat(parts, axis)

    @staticmethod
    def ones(shape: tuple[int, ...], like: Array) -> Array:
        torch = sys.modules["torch"]
        return torch.ones(shape, dtype=torch.bool, device=like.device)

    @staticmethod
    def mark_written(x: Array) -> None:
        # so that autograd sees when a tensor it saved is overwritten
        sys.modules["torch"].autograd.graph.increment_version(x)


class Cupy(Numpy):
    @staticmethod
    def empty(shape: tuple[int, ...], dtype: str | None, like: Array) -> Array:
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, like.dtype if dtype is None else dtype)

    @staticmethod
    def broadcast(x: Array, shape: tuple[int, ...]) -> Array:
        return sys.modules["cupy"].broadcast_to(x, shape)

    @staticmethod
    def concatenate(parts: list[Array], axis: int = 2) -> Array:
        with parts[0].device:
            return sys.modules["cupy"].concatenate(parts, axis)

    @staticmethod
    def ones(shape: tuple[int, ...], like: Array) -> Array:
        with like.device:
            return sys.modules["cupy"].ones(shape, bool)


class Jax(Numpy):
    """Eager jax arrays on the CPU: read as numpy views, returned from buffers that jax can adopt. jax arrays are
    immutable, so no kernel ever sees one as an output."""

    @staticmethod
    def enter(x: Array) -> Array:
        if isinstance(x, sys.modules["jax"].core.Tracer):
            raise TypeError("expected a concrete array, got a jax tracer: use subquad.jax inside jit, grad and vmap")
        devices = {d.platform for d in x.devices()}
        if devices != {"cpu"}:
            got = ", ".join(sorted(devices))
            raise TypeError(f"expected a jax array on the cpu, got one on {got}: use subquad.jax")
        return np.asarray(x)

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: str | None, like: Array) -> Array:
        element = np.dtype(like.dtype if dtype is None else dtype)
        size = int(np.prod(shape, dtype=np.int64)) * element.itemsize
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + size].view(element).reshape(shape)

    @staticmethod
    def leave(x: Array) -> Array:
        return sys.modules["jax"].numpy.asarray(x)


class DeviceMemory(Numpy):
    """The device memory of a custom call of XLA (subquad.jax), whose results have their place already."""

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: str | None, like: Array) -> Array:
        return like.queue.empty(shape, np.dtype(like.dtype if dtype is None else dtype))

    @staticmethod
    def broadcast(x: Array, shape: tuple[int, ...]) -> Array:
        return x.broadcast_to(shape)

    @staticmethod
    def concatenate(parts: list[Array], axis: int = 2) -> Array:
        raise NotImplementedError("[subquad.jax] device: expected the cpu for a function that joins arrays, got cuda")

    @staticmethod
    def ones(shape: tuple[int, ...], like: Array) -> Array:
        raise NotImplementedError("[subquad.jax] device: expected the cpu for a function that makes masks, got cuda")


_FRAMEWORKS = {"numpy": Numpy, "torch": Torch, "cupy": Cupy, "jax": Jax, "jaxlib": Jax}
framework_by_type: dict[type, Any] = {}


def framework_of(op: str, name: str, x: Array) -> Any:
    """The class above that serves the type of `x`. TypeError for what is no array of a known framework."""
    kind = type(x)
    found = framework_by_type.get(kind)
    if found is None:
        found = next((f for base in kind.__mro__ if (f := _FRAMEWORKS.get(base.__module__.split(".")[0]))), None)
        if found is None or not hasattr(x, "shape") or isinstance(x, np.generic):
            got = kind.__name__
            raise TypeError(f"[{op}] {name}: expected an array (numpy, torch, cupy or jax), got {got}")
        framework_by_type[kind] = found
    return found


def extent(op: str, name: str, value: Any, least: int = 1) -> int:
    """A number that becomes an extent of an array."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"[{op}] {name}: expected an integer, got {type(value).__name__}")
    if not least <= value < 2**31:
        rule = f"a value of at least {least}" if value < least else "a value below 2^31"
        raise ValueError(f"[{op}] {name}: expected {rule}, got {value}")
    return int(value)


class Call:
    """The arrays of one call, converted once, and outputs to match them."""

    def __init__(self, op: str, **arrays: Array):
        self.op = op
        name, first = next(iter(arrays.items()))
        self.framework = framework_of(op, name, first)
        self.arrays = {}
        for name, x in arrays.items():
            self.arrays[name] = self.enter(name, x)

    def enter(self, name: str, x: Array) -> Array:
        """`x` as the compiled module takes it; None stays None."""
        if x is None:
            return None
        if framework_of(self.op, name, x) is not self.framework:
            first = next(iter(self.arrays))
            raise TypeError(
                f"[{self.op}] {name}: expected an array of the same framework as {first}, got {type(x).__module__}."
                f"{type(x).__name__}"
            )
        try:
            return self.framework.enter(x)
        except TypeError as error:
            raise TypeError(f"[{self.op}] {name}: {error}") from None

    def keywords(self, keywords: dict[str, Any], *arrays: str) -> dict[str, Any]:
        """The keywords as the compiled module takes them: those named in `arrays` converted."""
        return {name: self.enter(name, value) if name in arrays else value for name, value in keywords.items()}

    def run(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Runs an operator that is a step of this call: what it refuses carries the name of this call."""
        try:
            function(*arguments)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"[{self.op}]" + str(error).partition("]")[2]) from None

    def flag(self, name: str, value: Any) -> bool:
        """What decides how many results there are."""
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"[{self.op}] {name}: expected True or False, got {type(value).__name__}")
        return bool(value)

    def wants_state(self, return_state: Any, is_causal: Any) -> bool:
        if self.flag("return_state", return_state) and not self.flag("is_causal", is_causal):
            raise ValueError(f"[{self.op}] return_state: expected is_causal=True with it, got {is_causal}")
        return bool(return_state)

    def state(self, state: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
        """The members of a state by their names: None each where there is none."""
        if state is None:
            return (None,) * len(names)
        if not isinstance(state, (tuple, list)) or len(state) != len(names):
            got = f"{len(state)} values" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(f"[{self.op}] state: expected None or a tuple ({', '.join(names)}), got {got}")
        return tuple(state)

    def extent(self, name: str, value: Any, least: int = 1) -> int:
        return extent(self.op, name, value, least)

    def shape(self, name: str, letters: str) -> tuple[int, ...]:
        """The shape of a required array; ValueError if its rank is not the number of letters."""
        if self.arrays[name] is None:
            raise TypeError(f"[{self.op}] {name}: expected an array (numpy, torch, cupy or jax), got NoneType")
        shape = tuple(self.arrays[name].shape)
        axes = letters.split()
        if len(shape) != len(axes):
            raise ValueError(f"[{self.op}] {name}: expected shape [{', '.join(axes)}], got {list(shape)}")
        return shape

    def empty(self, shape: tuple[int, ...], like: str, dtype: str | None = None) -> Array:
        """A new array for results, of the dtype of argument `like` unless another is named."""
        return self.framework.empty(shape, dtype, self.arrays[like])

    def out(self, out: Array, shape: tuple[int, ...], like: str, dtype: str | None = None) -> Array:
        """The caller's `out`, or a new array."""
        if out is None:
            return self.empty(shape, like, dtype)
        if self.framework is Jax:
            raise TypeError(f"[{self.op}] out: expected None for jax arrays, which are immutable, got an array")
        out = self.enter("out", out)
        self.framework.mark_written(out)
        return out

    def leave(self, *results: Array) -> Array:
        """Results in the caller's array type: one array, or a tuple of several."""
        converted = tuple(self.framework.leave(r) for r in results)
        return converted[0] if len(converted) == 1 else converted
