"""How a plain function of the library becomes a torch operator: all that torch asks for, from one description."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._function import Function

_library = torch.library.Library("subquad", "DEF")

# What an argument of each schema type may be; the core words its own errors in the same way.
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "an integer"),
    "float": ((int, float, torch.SymInt, torch.SymFloat), "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
    "List[int]": ((tuple, list), "a pair of integers"),
    "Tensor": (Tensor, "a torch tensor (subquad.{op} takes other arrays)"),
}

# Arguments of several types: the argument of the schema that a value of that type takes instead, and what it leaves.
_ALTERNATIVES: dict[str, tuple[str, Any, Any]] = {
    "seed": ("seed_tensor", Tensor, 0),
    "noise_std": ("noise_std_value", (int, float, torch.SymInt, torch.SymFloat), "exact"),
}


class Operator:
    """The pair of torch operators of a function, called with every argument by name. An empty [B, 0] stands for
    a result that the function does not give.

    options: the arguments that are no arrays in torch's schema language; a seed is "SymInt seed=0, Tensor?
        seed_tensor=None", and a length of noise "str noise_std='exact', float? noise_std_value=None".
    """

    def __init__(self, function: Function, options: str):
        f = self.function = function
        head = [f"Tensor {name}" for name in f.arrays]
        tail = [*filter(None, [options]), *(f"Tensor? {name}=None" for name in f.optional | f.constants)]
        self.op = TorchOp(
            f"{f.name}({', '.join(head + tail)}) -> ({', '.join('Tensor' for _ in f.results)})",
            kernel=self._forward,
            fake=self._forward_fake,
            save=self._save,
            gradient=self._gradient if f.backward else self._no_gradient,
            is_batched=f.is_batched,
            products=f.products,
            cast=f.cast,
        )
        if not f.backward:
            return
        cotangents = [f"Tensor{'?' if i else ''} d{name}" for i, name in enumerate(f.differentiable)]
        saved = [f"Tensor? {name}=None" for name in f.saved]
        self.op_bwd = TorchOp(
            f"{f.name}_bwd({', '.join(cotangents + head + tail + saved)}) -> "
            f"({', '.join('Tensor' for _ in f.arrays | f.optional)})",
            kernel=self._backward,
            fake=self._backward_fake,
            save=lambda ctx, inputs, output: None,
            gradient=self._second_gradient,
            is_batched=f.is_batched,
            products=f.products,
            summed=tuple(f.optional),
        )

    def __call__(self, *, out: None = None, last: bool = False, **given: Any) -> Any:
        """The first result, or with `last` a tuple of all."""
        f = self.function
        if out is not None:
            raise TypeError(f"[{f.op}] out: expected None, as autograd makes new results: use subquad.{f.op}")
        if last and f.is_last_absent(given):
            raise ValueError(f.absent_error(given))
        results = self._results(f.split(given))
        return results if last else results[0]

    def with_state(self, state: Any, return_state: bool, return_lse: bool = False, **given: Any) -> Any:
        """What the plain function returns for a call with a state."""
        f = self.function
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in state or ()):
            raise RuntimeError(
                f"[{f.op}] state: expected arrays that do not require grad, as states are not differentiated, got one "
                "that does: detach it"
            )
        if given.pop("out") is not None:
            raise TypeError(f"[{f.op}] out: expected None, as autograd makes new results: use subquad.{f.op}")
        given = f.split_with_state(given, state, return_lse)
        results, present = dict(zip(f.results, self._results(given), strict=True)), f.result_names(given)
        return f.with_state({name: results[name] for name in present}, return_lse, return_state)

    def _results(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        f, op = self.function, self.op
        for name, (other, kinds, rest) in _ALTERNATIVES.items():
            value = given.get(name)
            if isinstance(value, kinds) and not isinstance(value, bool):
                given |= {name: rest, other: value}
        seed = given.get("seed")
        if isinstance(seed, int) and 2**63 <= seed < 2**64:
            given["seed"] = seed - 2**64
        values = []
        for name, kind, exact, optional, default in op.arguments:
            value = given.get(name, default)
            # Of most values the type is all there is to check.
            if not (type(value) is exact or (optional and value is None)):
                value = _checked(f.op, name, kind, value)
            values.append(value)
        return op(*values)

    def _empty(self, first: Tensor) -> Tensor:
        return first.new_empty((first.shape[0], 0), dtype=torch.float32)

    def _forward(self, **given: Any) -> tuple[Tensor, ...]:
        return self._placed(given, self.function.run(**_plain(given)))

    def _placed(self, given: dict[str, Any], results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        f, first = self.function, next(iter(given.values()))
        if len(results) == len(f.results):
            return tuple(results)
        present = dict(zip(f.result_names(given), results, strict=True))
        return tuple(present[name] if name in present else self._empty(first) for name in f.results)

    def _backward(self, **given: Any) -> tuple[Tensor, ...]:
        f, first = self.function, given[next(iter(self.function.arrays))]
        if not f.saves(given):
            for name in f.saved:
                del given[name]
        for name in f.differentiable[1:]:
            if given[f"d{name}"] is None or name not in f.result_names(given):
                del given[f"d{name}"]
        gradients = dict(zip(f.gradients(given), f.run_backward(**_plain(given)), strict=True))
        return tuple(gradients[name] if name in gradients else self._empty(first) for name in f.arrays | f.optional)

    def _forward_fake(self, **given: Any) -> tuple[Tensor, ...]:
        f, first = self.function, next(iter(given.values()))
        results = [
            first.new_empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
            for dtype, shape in f.result_shapes(given).values()
        ]
        return self._placed(given, results)

    def _backward_fake(self, **given: Any) -> tuple[Tensor, ...]:
        like = [given[name] for name in self.function.arrays | self.function.optional]
        return tuple(self._empty(like[0]) if x is None else x.new_empty(x.shape) for x in like)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        f = self.function
        given = self.op.named(inputs)
        kept = output[: len(f.saved)] if f.saves(given) else ()
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *kept)
        ctx.values = [_Saved if isinstance(x, Tensor) else x for x in inputs]
        absent, formed = f.absent(given), f.differentiable
        constant = [x for x, name in zip(output, f.results, strict=True) if name in absent or name not in formed]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)

    def _gradient(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        f = self.function
        if all(x is None for x in cotangents):
            return (None,) * len(ctx.values)
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if x is _Saved else x for x in ctx.values]
        given = self.op.named(tuple(values))
        dout, *others = cotangents[: len(f.differentiable)]
        if dout is None:
            dtype, shape = f.result_shapes(given)[f.differentiable[0]]
            dout = values[0].new_zeros(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        others = [None if x is None else _with_contiguous_rows(x) for x in others]
        gradients = self.op_bwd(_with_contiguous_rows(dout), *others, *values, *saved)
        formed = dict(zip(f.arrays | f.optional, gradients, strict=True))
        return tuple(formed.get(name) if x is not None else None for name, x in given.items())

    def _no_gradient(self, _ctx: Any, *_cotangents: Tensor) -> None:
        raise RuntimeError(self.function.constant_error())

    def _second_gradient(self, _ctx: Any, *_gradients: Tensor) -> None:
        raise RuntimeError(
            f"[{self.function.name}] backward: expected to be differentiated once, got a second time: gradients of "
            "its gradients are not implemented"
        )


class _Saved:
    """Stands for a tensor in ctx.save_for_backward, which notices when somebody overwrites it; ctx itself would not."""


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the plain function, which takes values of several types by one name."""
    for name, (other, _, _) in _ALTERNATIVES.items():
        value = given.pop(other, None)
        if value is not None:
            given[name] = value
    return given


def _checked(op: str, name: str, kind: str, value: Any) -> Any:
    """The value as the dispatcher takes it, whose own error would be a RuntimeError in another grammar."""
    python, expected = _KINDS[kind]
    if kind == "int":
        if not isinstance(value, (int, torch.SymInt)) and hasattr(value, "__index__"):
            value = operator.index(value)
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"[{op}] {name}: expected an integer of 64 bits, got {value}")
            return value
    elif isinstance(value, python) and not (kind == "float" and isinstance(value, bool)):
        return value
    raise TypeError(f"[{op}] {name}: expected {expected.format(op=op)}, got {type(value).__name__}")


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose last axis is contiguous, which is what the kernels take."""
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def _autograd_function(name: str, rules: dict[str, Callable[..., Any]]) -> Any:
    statics = {key: staticmethod(rule) for key, rule in rules.items()}
    return type(f"Autograd_{name}", (torch.autograd.Function,), statics)


class TorchOp:
    """One torch operator and its rules. Kernel and fake are called by keyword with every argument of the schema and
    return a tuple, as a call does.

    torch.library.register_autograd is not used: it costs several times as much a call and refuses torch.func.grad.

    is_batched: whether an argument of that name and rank has a leading batch axis.
    summed: arguments that, without a batch axis, get results that are sums over the batch.
    products: arguments without a batch axis whose extents depend on the batch.
    cast: the arrays that autocast casts.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None],
        gradient: Callable[..., Any],
        is_batched: Callable[[str, int], bool],
        summed: Sequence[str] = (),
        products: Sequence[str] = (),
        cast: Sequence[str] = (),
    ):
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.subquad, name).default
        arguments = self.overload._schema.arguments
        # An operator of torch with one result returns it bare.
        self.single = len(self.overload._schema.returns) == 1
        self.names = [a.name for a in arguments]
        types = [str(a.type) for a in arguments]
        kinds = [
            (t.removeprefix("Optional[").removesuffix("]"), True) if t.startswith("Optional[") else (t, False)
            for t in types
        ]
        exact = {"Tensor": Tensor, "bool": bool, "str": str, "float": float}
        self.defaults = tuple(a.default_value if a.has_default_value() else None for a in arguments)
        self.arguments = [
            (name, kind, exact.get(kind), optional, default)
            for name, (kind, optional), default in zip(self.names, kinds, self.defaults, strict=True)
        ]
        self.is_batched, self.summed, self.products = is_batched, summed, products
        self.cast = [self.names.index(name) for name in cast]

        def forward_and_save(ctx: Any, *values: Any) -> Any:
            output = self._below_autograd(*values)
            save(ctx, values, self._tuple(output))
            return output

        # torch.func needs the first form; the second costs half as much in eager mode.
        functional: dict[str, Callable[..., Any]] = {
            "forward": self._below_autograd,
            "setup_context": lambda ctx, inputs, output: save(ctx, inputs, self._tuple(output)),
            "backward": gradient,
            "vmap": self._vmap,
        }
        self.functional = _autograd_function(name, functional)
        self.eager = _autograd_function(name, {"forward": forward_and_save, "backward": gradient})
        _library.impl(name, lambda *values: self._bare(kernel(**self.named(values))), "CompositeExplicitAutograd")
        _library.impl(name, self._autograd, "Autograd")
        torch.library.register_fake(
            f"subquad::{name}", lambda *values: self._bare(fake(**self.named(values))), lib=_library
        )
        torch.library.register_vmap(f"subquad::{name}", self._vmap, lib=_library)
        if cast:
            _library.impl(name, lambda *values: self._autocast("cpu", *values), "AutocastCPU")
            _library.impl(name, lambda *values: self._autocast("cuda", *values), "AutocastCUDA")

    def __call__(self, *values: Any) -> tuple[Tensor, ...]:
        return self._tuple(self._call(*values))

    def _call(self, *values: Any) -> Any:
        # Under torch.func.grad only a Function that is entered from outside the dispatcher is differentiated.
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            device = values[0].device.type
            if self.cast and torch.is_autocast_enabled(device):
                return self._autocast(device, *values)
            return self.functional.apply(*self._filled(values))
        return self.overload(*values)

    def _tuple(self, results: Any) -> tuple[Tensor, ...]:
        return (results,) if self.single else results

    def _bare(self, results: tuple[Any, ...]) -> Any:
        return results[0] if self.single else results

    def _filled(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Every value: the dispatcher drops trailing ones that equal their defaults."""
        return values + self.defaults[len(values) :]

    def named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.names, self._filled(values), strict=True))

    def _below_autograd(self, *values: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*values)

    def _autograd(self, *values: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values):
            return self.eager.apply(*self._filled(values))
        return self._below_autograd(*values)

    def _autocast(self, device: str, *values: Any) -> Any:
        """As in a matrix product; sums are float32 in any case, and so are biases, gates, noise and projections."""
        dtype = torch.get_autocast_dtype(device)
        cast = [
            x if i not in self.cast or x is None or x.dtype == torch.float64 else x.to(dtype)
            for i, x in enumerate(values)
        ]
        with torch.autocast(device, enabled=False):
            return self._call(*cast)

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *values: Any) -> tuple[Any, Any]:
        """vmap folds its axis into the batch: draws do not depend on the batch, so that nothing changes but the shape.
        Over an argument without a batch axis (a seed, planes), or where a result is a sum over the batch, it loops."""
        # The axes of an argument that is a list are a list too.
        size, dims = info.batch_size, [dim if isinstance(dim, int) else None for dim in in_dims]
        placed = list(zip(self.names, values, dims, strict=False))
        batched = {
            name
            for name, x, dim in placed
            if isinstance(x, Tensor) and self.is_batched(name, x.ndim - (dim is not None))
        }
        sums = any(
            x is not None and (name in self.products or (name in self.summed and name not in batched))
            for name, x, _ in placed
        )

        def fold(x: Tensor, dim: int | None) -> Tensor:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return _with_contiguous_rows(x.flatten(0, 1))

        if not sums and all(dim is None or name in batched for name, _, dim in placed):
            results = self(*(fold(x, dim) if name in batched else x for name, x, dim in placed))
            batch = next(x.movedim(dim, 0).shape[1] for _, x, dim in placed if dim is not None)
            unfolded = [r.unflatten(0, (size, batch)) for r in results]
        else:

            def item(x: Tensor, dim: int | None, i: int) -> Tensor:
                return x if dim is None else _with_contiguous_rows(x.select(dim, i))

            items = [self(*(item(x, dim, i) for _, x, dim in placed)) for i in range(size)]
            unfolded = [torch.stack(parts) for parts in zip(*items, strict=True)]
        return self._bare(tuple(unfolded)), self._bare((0,) * len(unfolded))
