"""The table of operators with gradients: one entry each, and what jax has to know of every one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .. import _differentiable as plain
from .. import _differentiable_sparse as sparse
from .._arrays import Jax, framework_of
from .._function import Function
from . import _cuda, _ffi  # noqa: F401  # _cuda registers the custom call for CUDA devices


class Operator:
    """A function under jit, grad and vmap, called with every argument by name, arrays that are None too."""

    def __init__(self, function: Function):
        f = self.function = function
        _ffi.FUNCTIONS[f.name] = f.run
        _ffi.FUNCTIONS[f"{f.name}_bwd"] = f.run_backward
        self.differentiable = jax.custom_vjp(self._forward, nondiff_argnums=(0,))
        self.differentiable.defvjp(self._save, self._gradient)

    def __call__(self, *, last: bool = False, **given: Any) -> Any:
        """The first result, or with `last` a tuple of all."""
        results = self._results(self.function.split(given))
        if last and self.function.is_last_absent(given):
            raise ValueError(self.function.absent_error(given))
        return results if last else results[0]

    def with_state(self, state: Any, return_state: bool, return_lse: bool = False, **given: Any) -> Any:
        """What the plain function returns for a call with a state."""
        f = self.function
        given = f.split_with_state(given, state, return_lse)
        results = dict(zip(f.result_names(given), self._results(given), strict=True))
        return f.with_state(results, return_lse, return_state)

    def _results(self, given: dict[str, Any]) -> tuple[Any, ...]:
        f = self.function
        arrays, options = {}, {}
        for name, x in given.items():
            if name not in f.all_arrays:
                options[name] = x
            elif x is not None or name in f.arrays:
                if framework_of(f.op, name, x) is not Jax:
                    expected = f"a jax array (subquad.{f.op} takes other arrays)"
                    got = f"{type(x).__module__}.{type(x).__name__}"
                    raise TypeError(f"[{f.op}] {name}: expected {expected}, got {got}")
                arrays[name] = x
        seed = options.get("seed")
        if isinstance(seed, jax.Array):
            if seed.ndim or not jax.numpy.issubdtype(seed.dtype, jax.numpy.integer):
                got = f"an array of shape {list(seed.shape)} and dtype {seed.dtype}"
                raise TypeError(f"[{f.op}] seed: expected an integer or a 0-d integer array, got {got}")
            del options["seed"]
            arrays["seed"] = seed
        if _is_plain(arrays):
            return _ffi.plain(f.name, arrays, options)
        self._check(arrays, options)
        results = self.differentiable(json.dumps(options, default=lambda x: x.item()), arrays)
        names = f.result_names(arrays | options)
        return tuple(
            x if name in f.differentiable else jax.lax.stop_gradient(x) for name, x in zip(names, results, strict=True)
        )

    def _check(self, arrays: dict[str, Any], options: dict[str, Any]) -> None:
        """Raises the plain function's own errors while jax traces: it runs on ones, cut to one item and where possible
        one token. Where shapes disagree or an argument is refused, it runs on the true shapes, so that its sentence has
        them; that fails before any work and takes no memory."""
        f = self.function
        if any(name in arrays for name in f.products):
            return  # the custom call raises them when it runs
        shapes = {name: tuple(x.shape) for name, x in arrays.items() if name != "seed"}
        seed = {"seed": 0} if "seed" in arrays else {}

        def run(shapes: dict[str, tuple[int, ...]], make: Callable[..., Any], **sizes: int) -> None:
            # Most integers are numbers of tokens, of which there may be one.
            values = {x: f.fills.get(x, 0) if arrays[x].dtype.kind == "i" else 1 for x in shapes}
            ones = {x: make(shape, values[x], arrays[x].dtype) for x, shape in shapes.items()}
            f.run(**ones, **seed, **(options | sizes))

        def broadcast(shape: tuple[int, ...], value: Any, dtype: Any) -> Any:
            return np.broadcast_to(np.full(shape[-1:], value, dtype), shape)

        axes = {name: f.axes(name, shape) for name, shape in shapes.items()}
        sizes = {name: axis for name, axis in f.sizes.items() if type(options.get(name)) is int}
        extents = {axis: options[name] for name, axis in sizes.items()}
        for name, letters in axes.items():
            known = zip(letters or (), shapes[name], strict=False)
            if (letters is None and f.all_arrays[name]) or any(extents.setdefault(a, n) != n for a, n in known):
                return run(shapes, broadcast)
        tokens = {"B"} if any(name in arrays for name in f.lengths) else {"B", "N", "M", "N2"}
        extents = {a: min(n, 1) if a in tokens else n for a, n in extents.items()}
        cut = {x: tuple(extents[a] for a in letters) for x, letters in axes.items() if letters}
        try:
            run(shapes | cut, np.full, **{name: extents[axis] for name, axis in sizes.items()})
        except (TypeError, ValueError) as error:
            run(shapes, broadcast)
            raise error

    def _forward(self, options: str, arrays: dict[str, Any]) -> tuple[Any, ...]:
        f, given = self.function, json.loads(options)
        results = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in f.result_shapes(arrays | given).values()]
        return self._run(f.name, arrays, given, results, {*f.all_arrays}, f.takes_out)

    def _save(self, options: str, arrays: dict[str, Any]) -> tuple[Any, Any]:
        f = self.function
        results = self._forward(options, arrays)
        return results, (arrays, results[: len(f.saved)] if f.saves(arrays | json.loads(options)) else ())

    def _gradient(self, options: str, saved: Any, cotangents: tuple[Any, ...]) -> Any:
        f, (arrays, results), given = self.function, saved, json.loads(options)
        if f.backward is None:
            raise RuntimeError(f.constant_error())
        names = f.result_names(arrays | given)
        doubts = {f"d{name}": x for name, x in zip(names, cotangents, strict=True) if name in f.differentiable}
        wanted = list(f.gradients(arrays))
        shapes = [jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in wanted]
        # A gradient without a batch axis is a sum over the batch: vmap cannot fold its axis into that.
        fold = all(f.is_batched(name, arrays[name].ndim) for name in wanted)
        batched = {*f.all_arrays, *f.results, *doubts} if fold else set()
        operands = doubts | arrays | dict(zip(f.saved, results, strict=False))
        gradients = self._run(f"{f.name}_bwd", operands, given, shapes, batched, takes_out=False)
        return (dict.fromkeys(arrays) | dict(zip(wanted, gradients, strict=True)),)

    def _run(
        self,
        name: str,
        arrays: dict[str, Any],
        options: dict[str, Any],
        results: list[Any],
        batched: set[str],
        takes_out: bool,
    ) -> tuple[Any, ...]:
        if _is_plain(arrays):
            return _ffi.plain(name, arrays, options)
        f = self.function
        batched = {x for x in batched if x in arrays and f.is_batched(x, np.ndim(arrays[x]))}
        if any(name in arrays for name in f.products):
            batched = set()
        return _ffi.call(name, arrays, options, results, batched=batched, takes_out=takes_out)


def _is_plain(arrays: dict[str, Any]) -> bool:
    """Whether the plain function takes them all: arrays with values, on the CPU. Elsewhere only XLA knows the stream.
    jax.grad may pass on a caller's numpy arrays, which it does not take."""
    for x in arrays.values():
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            return False
        if next(iter(x.devices())).platform != "cpu":
            return False
    return True


YOSO_ATTENTION = Operator(plain.YOSO_ATTENTION)
COLLISION_ATTENTION = Operator(plain.COLLISION_ATTENTION)
SOFTMAX_ATTENTION = Operator(plain.SOFTMAX_ATTENTION)
MERGE_STATES = Operator(plain.MERGE_STATES)
SEGMENT_MEAN = Operator(plain.SEGMENT_MEAN)
FEATURE_MAP = Operator(plain.FEATURE_MAP)
LINEAR_ATTENTION = Operator(plain.LINEAR_ATTENTION)
LINEAR_ATTENTION_STATE = Operator(plain.LINEAR_ATTENTION_STATE)
RFA_ATTENTION = Operator(plain.RFA_ATTENTION)
RFA_ATTENTION_STATE = Operator(plain.RFA_ATTENTION_STATE)
RANDOMIZED_ATTENTION = Operator(plain.RANDOMIZED_ATTENTION)
LARA_ATTENTION = Operator(plain.LARA_ATTENTION)
EVA_ATTENTION = Operator(plain.EVA_ATTENTION)
EVA_ATTENTION_STATE = Operator(plain.EVA_ATTENTION_STATE)
SPARSE_ATTENTION = Operator(sparse.SPARSE_ATTENTION)
SEA_ATTENTION = Operator(sparse.SEA_ATTENTION)
RUNNING_MEAN = Operator(sparse.RUNNING_MEAN)
RUNNING_MEAN_STATE = Operator(sparse.RUNNING_MEAN_STATE)
BLOCK_POOL = Operator(sparse.BLOCK_POOL)
EXPAND_VALUES = Operator(sparse.EXPAND_VALUES)
BLOCK_SUM = Operator(sparse.BLOCK_SUM)
ATTENTION_DIVERGENCE = Operator(sparse.ATTENTION_DIVERGENCE)
TEACHER_BLOCKS = Operator(sparse.TEACHER_BLOCKS)
SEA_ESTIMATE = Operator(sparse.SEA_ESTIMATE)
SEA_ESTIMATE_STATE = Operator(sparse.SEA_ESTIMATE_STATE)
