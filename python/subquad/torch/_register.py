"""How a plain function of the library becomes a torch operator: all that torch asks for, from one description."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("subquad", "DEF")

# What an argument of each schema type may be; the core words its own errors in the same way.
_KINDS = {
    "int": (int, "an integer"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
    "Tensor": (Tensor, "a torch tensor (subquad.{op} takes other arrays)"),
}


@dataclass(frozen=True)
class Description:
    """A differentiable function f and its f_bwd, as torch has to know them.

    arrays: the differentiable arguments in the order of their gradients, and their axes; equal letters are equal
        extents, and the first array decides dtype and device of the result.
    masks: arguments that may be None, have the batch axis and no gradient.
    options: the remaining arguments in torch's schema language; a seed is "SymInt seed=0, Tensor? seed_tensor=None".
    result: the axes of the result.
    has_lse: whether f, under these arguments, offers return_lse, a float32 array [the result's axes but the last], and
        f_bwd makes use of it and of the result.
    forward, backward: the plain functions, called by keyword; both take every option.
    """

    name: str
    arrays: dict[str, str]
    masks: dict[str, str]
    options: str
    result: str
    has_lse: Callable[[dict[str, Any]], bool]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Operator:
    """The pair of torch operators of a description. Calling it takes every argument of the schema in order and returns
    (result, lse); where there is no lse, an empty [B, 0] stands for it."""

    def __init__(self, description: Description):
        d = self.description = description
        head = [f"Tensor {name}" for name in d.arrays]
        tail = [d.options, *(f"Tensor? {name}=None" for name in d.masks)]
        batched = {*d.arrays, *d.masks}
        self.op = TorchOp(
            f"{d.name}({', '.join(head + tail)}) -> (Tensor, Tensor)",
            kernel=self._forward,
            fake=self._forward_fake,
            save=self._save,
            gradient=self._gradient,
            batched=batched,
            num_cast=len(d.arrays),
        )
        given = ["Tensor dout", *head, *tail, "Tensor? out=None", "Tensor? lse=None"]
        self.op_bwd = TorchOp(
            f"{d.name}_bwd({', '.join(given)}) -> ({', '.join('Tensor' for _ in head)})",
            kernel=self._backward,
            fake=self._backward_fake,
            save=lambda ctx, inputs, output: None,
            gradient=self._second_gradient,
            batched=batched | {"dout", "out", "lse"},
        )

    def __call__(self, *values: Any) -> tuple[Tensor, Tensor]:
        checked = []
        for name, (kind, optional), value in zip(self.op.names, self.op.kinds, values, strict=True):
            if not (optional and value is None):
                value = _checked(self.description.name, name, kind, value)
            checked.append(value)
        return self.op(*checked)

    def _forward(self, **given: Any) -> tuple[Tensor, Tensor]:
        d, lse = self.description, self.description.has_lse(given)
        first = next(iter(given.values()))
        if lse:
            return d.forward(**_with_one_seed(given), return_lse=True)
        return d.forward(**_with_one_seed(given)), first.new_empty((first.shape[0], 0), dtype=torch.float32)

    def _backward(self, **given: Any) -> tuple[Tensor, ...]:
        if not self.description.has_lse(given):
            del given["out"], given["lse"]
        return self.description.backward(**_with_one_seed(given))

    def _forward_fake(self, **given: Any) -> tuple[Tensor, Tensor]:
        d = self.description
        extents: dict[str, Any] = {}
        for name, axes in d.arrays.items():
            letters, shape = axes.split(), given[name].shape
            if len(letters) != len(shape):
                raise ValueError(f"[{d.name}] {name}: expected shape [{', '.join(letters)}], got {list(shape)}")
            extents.update(zip(letters, shape, strict=True))
        first, shape = given[next(iter(d.arrays))], [extents[letter] for letter in d.result.split()]
        lse = shape[:-1] if d.has_lse(given) else (shape[0], 0)
        return first.new_empty(shape), first.new_empty(lse, dtype=torch.float32)

    def _backward_fake(self, **given: Any) -> tuple[Tensor, ...]:
        return tuple(given[name].new_empty(given[name].shape) for name in self.description.arrays)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        kept = output if self.description.has_lse(self.op.named(inputs)) else ()
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *kept)
        ctx.values = [_Saved if isinstance(x, Tensor) else x for x in inputs]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def _gradient(self, ctx: Any, dout: Tensor | None, _dlse: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.values)
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if x is _Saved else x for x in ctx.values]
        gradients = self.op_bwd(_with_contiguous_rows(dout), *values, *saved)
        return (*gradients, *(None for _ in values[len(gradients) :]))

    def _second_gradient(self, _ctx: Any, *_gradients: Tensor) -> None:
        raise RuntimeError(
            f"[{self.description.name}] backward: expected to be differentiated once, got a second time: gradients of "
            "its gradients are not implemented"
        )


class _Saved:
    """Stands for a tensor in ctx.save_for_backward, which notices when somebody overwrites it; ctx itself would not."""


def _with_one_seed(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the plain function: it takes an int or an array by the name `seed`."""
    seed = given.pop("seed_tensor", None)
    if seed is not None:
        given["seed"] = seed
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
    elif isinstance(value, python):
        return value
    raise TypeError(f"[{op}] {name}: expected {expected.format(op=op)}, got {type(value).__name__}")


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose last axis is contiguous, which is what the kernels take."""
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def _autograd_function(name: str, rules: dict[str, Callable[..., Any]]) -> Any:
    statics = {key: staticmethod(rule) for key, rule in rules.items()}
    return type(f"Autograd_{name}", (torch.autograd.Function,), statics)


class TorchOp:
    """One torch operator and its rules. Kernel and fake are called by keyword with every argument of the schema.

    torch.library.register_autograd is not used: it costs several times as much a call and refuses torch.func.grad.

    batched: the names of the arguments with a leading batch axis.
    num_cast: how many leading arrays autocast casts.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None],
        gradient: Callable[..., Any],
        batched: set[str],
        num_cast: int = 0,
    ):
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.subquad, name).default
        arguments = self.overload._schema.arguments
        self.names = [a.name for a in arguments]
        types = [str(a.type) for a in arguments]
        self.kinds = [(t.removeprefix("Optional[").removesuffix("]"), t.startswith("Optional[")) for t in types]
        self.defaults = tuple(a.default_value if a.has_default_value() else None for a in arguments)
        self.batched, self.num_cast = batched, num_cast

        def forward_and_save(ctx: Any, *values: Any) -> Any:
            output = self._below_autograd(*values)
            save(ctx, values, output)
            return output

        # torch.func needs the first form; the second costs half as much in eager mode.
        functional = {"forward": self._below_autograd, "setup_context": save, "backward": gradient, "vmap": self._vmap}
        self.functional = _autograd_function(name, functional)
        self.eager = _autograd_function(name, {"forward": forward_and_save, "backward": gradient})
        _library.impl(name, lambda *values: kernel(**self.named(values)), "CompositeExplicitAutograd")
        _library.impl(name, self._autograd, "Autograd")
        torch.library.register_fake(f"subquad::{name}", lambda *values: fake(**self.named(values)), lib=_library)
        torch.library.register_vmap(f"subquad::{name}", self._vmap, lib=_library)
        if num_cast:
            _library.impl(name, lambda *values: self._autocast("cpu", *values), "AutocastCPU")
            _library.impl(name, lambda *values: self._autocast("cuda", *values), "AutocastCUDA")

    def __call__(self, *values: Any) -> Any:
        # Under torch.func.grad only a Function that is entered from outside the dispatcher is differentiated.
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            device = values[0].device.type
            if self.num_cast and torch.is_autocast_enabled(device):
                return self._autocast(device, *values)
            return self.functional.apply(*self._filled(values))
        return self.overload(*values)

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
        """The arrays take autocast's dtype, as in a matrix product; sums are float32 in any case."""
        dtype = torch.get_autocast_dtype(device)
        arrays = (x if x.dtype == torch.float64 else x.to(dtype) for x in values[: self.num_cast])
        with torch.autocast(device, enabled=False):
            return self(*arrays, *values[self.num_cast :])

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *values: Any) -> tuple[Any, Any]:
        """vmap folds its axis into the batch: draws do not depend on the batch, so that nothing changes but the shape.
        Over an argument without a batch axis (a seed, planes) it loops."""
        size, placed = info.batch_size, list(zip(self.names, values, in_dims, strict=False))

        def fold(x: Tensor, dim: int | None) -> Tensor:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return _with_contiguous_rows(x.flatten(0, 1))

        if all(dim is None or name in self.batched for name, _, dim in placed):
            results = self(*(fold(x, dim) if name in self.batched and x is not None else x for name, x, dim in placed))
            batch = next(x.movedim(dim, 0).shape[1] for _, x, dim in placed if dim is not None)
            unfolded = [r.unflatten(0, (size, batch)) for r in results]
        else:

            def item(x: Tensor, dim: int | None, i: int) -> Tensor:
                return x if dim is None else _with_contiguous_rows(x.select(dim, i))

            items = [self(*(item(x, dim, i) for _, x, dim in placed)) for i in range(size)]
            unfolded = [torch.stack(parts) for parts in zip(*items, strict=True)]
        return tuple(unfolded), (0,) * len(unfolded)
