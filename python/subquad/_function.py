"""The description of a differentiable function, of which every adapter makes what its framework asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Given = dict[str, Any]
Extents = dict[str, Any]


def _nothing_more(_extents: Extents, _given: Given) -> Extents:
    return {}


def _none(_given: Given) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Function:
    """A function f and its f_bwd. Axes are letters, and equal letters are equal extents, or digits, extents themselves;
    " | " separates the forms that an array may have. `Given` is every array and option of a call by its name in this
    table.

    arrays: the differentiable arguments in the order of their gradients.
    optional: differentiable arguments that may be None; behind those of `arrays`, f_bwd gives a gradient for each that
        is given.
    constants: arrays that may be None and have no gradient.
    groups: arguments of f that are tuples of arrays, and the names of those arrays in this table.
    results: of f, in its order; the first is `out`.
    dtypes: of the results, a name or that of the array named; default float32, for `out` that of the first array.
    extents: those letters of results that no array has.
    sizes: the letters that options are the extents of.
    absent: the results that f does not give in a call; last_needs: what the last one takes, in words, and the arguments
        that decide it.
    differentiable: the results that have a cotangent: "d" + name is a keyword of f_bwd.
    saved: results that f_bwd takes, if f gives all of them.
    lengths: arrays with extents that follow from the number of tokens.
    products: arrays whose extents follow from several others, so that no smaller call stands for this one.
    cast: the arrays that take autocast's dtype.
    fills: integers that an array may always hold, where that is not 0.
    takes_out: whether f writes `out` into an array given by that name.
    forward, backward: f and f_bwd by keyword. f gives all of its results; backward None: f has no derivative.
    no_gradient: what to do where f without a derivative is differentiated, in words.
    """

    name: str
    arrays: dict[str, str]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    optional: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=lambda: {"out": "B H N E"})
    dtypes: dict[str, str | Callable[[Given], str]] = field(default_factory=dict)
    extents: Callable[[Extents, Given], Extents] = _nothing_more
    sizes: dict[str, str] = field(default_factory=dict)
    absent: Callable[[Given], tuple[str, ...]] = _none
    last_needs: tuple[str, tuple[str, ...]] = ("", ())
    differentiable: tuple[str, ...] = ("out",)
    saved: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    fills: dict[str, int] = field(default_factory=dict)
    takes_out: bool = True
    no_gradient: str = ""

    @property
    def op(self) -> str:
        """f as errors name it."""
        return self.name.removesuffix("_state")

    @property
    def all_arrays(self) -> dict[str, str]:
        return self.arrays | self.optional | self.constants

    def _forms(self, name: str) -> list[list[str]]:
        table = self.all_arrays | self.results
        name = name if name in table else name.removeprefix("d")
        return [axes.split() for axes in table.get(name, "").split(" | ")]

    def axes(self, name: str, shape: Any) -> list[str] | None:
        """The axes of an argument or result of that shape; None where the table has none."""

        def fits(axes: list[str]) -> bool:
            return len(axes) == len(shape) and all(n == int(a) for a, n in zip(axes, shape, strict=True) if a.isdigit())

        return next((axes for axes in self._forms(name) if fits(axes)), None)

    def is_batched(self, name: str, rank: int) -> bool:
        """Whether that argument has the batch axis, which is then its first."""
        return any(len(axes) == rank and axes[0] == "B" for axes in self._forms(name) if axes)

    def result_shapes(self, given: Given) -> dict[str, tuple[Any, list[Any]]]:
        """dtype (an array's, or a name) and shape of each result that f gives."""
        extents: Extents = {}
        for name, axes in (self.constants | self.optional | self.arrays).items():
            if given.get(name) is not None:
                shape = given[name].shape
                letters = self.axes(name, shape)
                if letters is None and name in self.arrays:
                    raise ValueError(f"[{self.op}] {name}: expected shape [{', '.join(axes.split())}], got {[*shape]}")
                extents.update(zip(letters or (), shape, strict=False))
        extents |= self.extents(extents, given)
        extents |= {axis: given[name] for name, axis in self.sizes.items() if given.get(name) is not None}
        shapes = {}
        for name in self.result_names(given):
            dtype = self.dtypes.get(name, next(iter(self.arrays)) if name == "out" else "float32")
            dtype = dtype if isinstance(dtype, str) else dtype(given)
            shapes[name] = (
                given[dtype].dtype if dtype in given else dtype,
                [int(a) if a.isdigit() else extents[a] for a in self.results[name].split()],
            )
        return shapes

    def result_names(self, given: Given) -> list[str]:
        """The results that f gives."""
        absent = self.absent(given)
        return [name for name in self.results if name not in absent] if absent else [*self.results]

    def absent_error(self, given: Given) -> str:
        """For a call that asks for the last result where there is none."""
        rule, names = self.last_needs
        got = ", ".join(f"{name}={given[name]!r}" for name in names)
        return f"[{self.op}] {[*self.results][-1]}: expected {rule} where it is asked for, got {got}"

    def split_with_state(self, given: Given, state: Any, return_lse: bool) -> Given:
        """A call with a state in the names of this table."""
        if return_lse and "lse" not in self.results:
            raise ValueError(f"[{self.op}] lse: expected a call without a state where it is asked for, got one with it")
        return self.split(given | {"state": state})

    def with_state(self, results: dict[str, Any], return_lse: bool, return_state: bool) -> Any:
        """What f returns, from the results of a call with a state, whose arrays are the last ones."""
        state = tuple(results.get(name) for name in [*self.results][-len(self.groups["state"]) :])
        shown = [results["out"], *([results["lse"]] if return_lse else ()), *([state] if return_state else ())]
        return shown[0] if len(shown) == 1 else tuple(shown)

    def constant_error(self) -> str:
        """For a gradient through a function that has none."""
        if self.no_gradient:
            rule = "expected results that are not differentiated, got a gradient"
            return f"[{self.op}] backward: {rule}: {self.no_gradient}"
        return (
            f"[{self.op}] backward: expected a call without state and return_state, got one with them: states are for "
            "decoding and not differentiated"
        )

    def is_last_absent(self, given: Given) -> bool:
        return [*self.results][-1] in self.absent(given)

    def saves(self, given: Given) -> bool:
        absent = self.absent(given)
        return bool(self.saved) and not any(name in absent for name in self.saved)

    def gradients(self, given: Given) -> Iterator[str]:
        """The arrays f_bwd gives gradients for, in its order."""
        yield from self.arrays
        yield from (name for name in self.optional if given.get(name) is not None)

    def split(self, given: Given) -> Given:
        """A call of f in the names of this table."""
        if not self.groups:
            return given
        split: Given = {}
        for name, value in given.items():
            members = self.groups.get(name)
            if members is None:
                split[name] = value
            elif value is None:
                split |= dict.fromkeys(members)
            elif isinstance(value, (tuple, list)) and len(value) == len(members):
                split |= zip(members, value, strict=True)
            else:
                got = f"{len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
                raise TypeError(f"[{self.op}] {name}: expected a tuple of {len(members)} arrays, got {got}")
        return split

    def _joined(self, given: Given) -> Given:
        joined = given
        for name, members in self.groups.items():
            values = tuple(joined.pop(member, None) for member in members)
            if any(value is not None for value in values):
                joined[name] = values
        return joined

    def run(self, **given: Any) -> tuple[Any, ...]:
        results = self.forward(**self._joined(given))
        if not isinstance(results, tuple):
            return (results,)
        flat: list[Any] = []
        for result in results:
            flat += result if isinstance(result, tuple) else (result,)
        return tuple(x for x in flat if x is not None)

    def run_backward(self, **given: Any) -> tuple[Any, ...]:
        assert self.backward is not None
        gradients = self.backward(**self._joined(given))
        return gradients if isinstance(gradients, tuple) else (gradients,)
