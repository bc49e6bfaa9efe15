"""The table of operators with gradients: one entry each, and what jax has to know of every one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .. import _differentiable as plain
from .._arrays import Jax, framework_of
from . import _ffi

_TOKENS = {"B", "N", "M"}  # the axes whose extents no error but one of shapes depends on

__all__ = ["COLLISION_ATTENTION", "YOSO_ATTENTION"]


@dataclass(frozen=True)
class Description:
    """A differentiable function f and its f_bwd.

    arrays: the differentiable arguments in the order of their gradients, and their axes; the first decides the dtype of
        the result.
    masks: arguments that may be None and have the batch axis and no gradient, and their axes.
    result: the axes of the result.
    has_lse: whether f, under these options, offers return_lse, a float32 array [the result's axes but the last], and
        f_bwd makes use of it and of the result.
    forward, backward: the plain functions, called by keyword; both take every option.
    """

    name: str
    arrays: dict[str, str]
    masks: dict[str, str]
    result: str
    has_lse: Callable[[dict[str, Any]], bool]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Operator:
    """A description under jit, grad and vmap. A call takes arrays (some None) and options and gives what f gives."""

    def __init__(self, description: Description):
        d = self.description = description
        self.axes = {name: axes.split() for name, axes in (d.arrays | d.masks).items()}
        self.batched = {*self.axes, "dout", "out", "lse"}
        _ffi.FUNCTIONS[d.name] = d.forward
        _ffi.FUNCTIONS[f"{d.name}_bwd"] = d.backward
        self.differentiable = jax.custom_vjp(self._forward, nondiff_argnums=(0, 1))
        self.differentiable.defvjp(self._save, self._gradient)

    def __call__(self, arrays: dict[str, Any], options: dict[str, Any], return_lse: bool = False) -> Any:
        d = self.description
        for name, x in arrays.items():
            if (x is not None or name in d.arrays) and framework_of(d.name, name, x) is not Jax:
                expected = f"a jax array (subquad.{d.name} takes other arrays)"
                raise TypeError(f"[{d.name}] {name}: expected {expected}, got {type(x).__module__}.{type(x).__name__}")
        given = {name: x for name, x in arrays.items() if x is not None}
        seed = options.get("seed")
        if isinstance(seed, jax.Array):
            if seed.ndim or not jax.numpy.issubdtype(seed.dtype, jax.numpy.integer):
                got = f"an array of shape {list(seed.shape)} and dtype {seed.dtype}"
                raise TypeError(f"[{d.name}] seed: expected an integer or a 0-d integer array, got {got}")
            options = {name: value for name, value in options.items() if name != "seed"}
            given["seed"] = seed
        asked = {"return_lse": True} if return_lse else {}
        if _has_values(given):
            results = _ffi.plain(d.name, given, options | asked)
        else:
            self._check(given, options | asked)
            results = self.differentiable(json.dumps(options, default=lambda x: x.item()), return_lse, given)
            results = (results[0], *map(jax.lax.stop_gradient, results[1:]))
        return results if return_lse else results[0]

    def _check(self, given: dict[str, Any], options: dict[str, Any]) -> None:
        """Raises the plain function's own errors while jax traces: it runs on ones, cut to one token of one item. Where
        shapes disagree or an argument is refused, it runs on the true shapes, so that its sentence has them; that fails
        before any work and takes no memory."""
        shapes = {name: tuple(x.shape) for name, x in given.items() if name != "seed"}
        seed = {"seed": 0} if "seed" in given else {}

        def run(shapes: dict[str, tuple[int, ...]]) -> None:
            ones = {x: np.broadcast_to(np.ones(shape[-1:], given[x].dtype), shape) for x, shape in shapes.items()}
            self.description.forward(**ones, **seed, **options)

        extents: dict[str, int] = {}
        agree = True
        for name, axes in self.axes.items():
            if name in shapes:
                agree &= len(axes) == len(shapes[name])
                agree &= all(extents.setdefault(a, n) == n for a, n in zip(axes, shapes[name], strict=False))
        if not agree:
            return run(shapes)
        extents = {letter: min(n, 1) if letter in _TOKENS else n for letter, n in extents.items()}
        cut = {name: tuple(extents[a] for a in axes) for name, axes in self.axes.items() if name in shapes}
        try:
            run(shapes | cut)
        except (TypeError, ValueError) as error:
            run(shapes)
            raise error

    def _forward(self, options: str, with_lse: bool, given: dict[str, Any]) -> tuple[Any, ...]:
        d = self.description
        extents: dict[str, int] = {}
        for name, axes in d.arrays.items():
            extents.update(zip(axes.split(), given[name].shape, strict=True))
        shape, dtype = tuple(extents[letter] for letter in d.result.split()), given[next(iter(d.arrays))].dtype
        results = [jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:-1], np.float32)]
        asked = {"return_lse": True} if with_lse else {}
        return self._run(d.name, given, json.loads(options) | asked, results[: 1 + with_lse], takes_out=True)

    def _save(self, options: str, with_lse: bool, given: dict[str, Any]) -> tuple[Any, Any]:
        keeps = self.description.has_lse(json.loads(options))
        results = self._forward(options, keeps, given)
        return results[: 1 + with_lse], (given, results if keeps else ())

    def _gradient(self, options: str, with_lse: bool, saved: Any, cotangents: tuple[Any, ...]) -> Any:
        d, (given, results) = self.description, saved
        arrays = {"dout": cotangents[0], **given} | dict(zip(("out", "lse"), results, strict=False))
        shapes = [jax.ShapeDtypeStruct(given[name].shape, given[name].dtype) for name in d.arrays]
        gradients = self._run(f"{d.name}_bwd", arrays, json.loads(options), shapes, takes_out=False)
        return (dict.fromkeys(given) | dict(zip(d.arrays, gradients, strict=True)),)

    def _run(
        self, function: str, arrays: dict[str, Any], options: dict[str, Any], results: list[Any], takes_out: bool
    ) -> tuple[Any, ...]:
        if _has_values(arrays):
            return _ffi.plain(function, arrays, options)
        return _ffi.call(function, arrays, options, results, batched=self.batched, takes_out=takes_out)


def _has_values(arrays: dict[str, Any]) -> bool:
    """Whether the plain function takes them all. jax.grad may pass on a caller's numpy arrays, which it does not."""
    return all(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in arrays.values())


YOSO_ATTENTION = Operator(Description(**plain.YOSO_ATTENTION))
COLLISION_ATTENTION = Operator(Description(**plain.COLLISION_ATTENTION))
