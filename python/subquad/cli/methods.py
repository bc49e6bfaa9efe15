"""The table of what `subquad compare` and `subquad crossover` run: one entry per method and budget.

A new method is one entry in ROWS; a method whose budget the user may choose also has one in FAMILIES.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import subquad

from .console import UserError
from .reference import softmax_attention, yoso_expectation

Array = NDArray[Any]
MAX_BITS = 24
MAX_HASHES = 65536


@dataclass(frozen=True)
class Target:
    """What a row estimates: compute(q, k, v, rows) evaluates it in float64 for the query rows `rows`."""

    label: str
    compute: Callable[[Array, Array, Array, Array], Array]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name: as --rows takes it. method, budget: as the table shows them; no budget means that nothing is sampled.
    run(q, k, v, seed): the output, in numpy. raw: what is compared with the target, where that is not the output.
    needs: the module that it cannot do without.
    """

    name: str
    method: str
    budget: str
    target: Target
    run: Callable[[Array, Array, Array, int], Array]
    raw: Callable[[Array, Array, Array, int], Array] | None = None
    needs: str | None = None

    @property
    def label(self) -> str:
        return f"{self.method}, {self.budget}" if self.budget else self.method

    def estimate(self, q: Array, k: Array, v: Array, seed: int) -> Array:
        return (self.raw or self.run)(q, k, v, seed)


SOFTMAX = Target("softmax attention", softmax_attention)


def _torch_sdpa(q: Array, k: Array, v: Array, seed: int) -> Array:
    import torch

    # torch does not know numpy's bfloat16, but takes its bits.
    bits = q.dtype.name == "bfloat16"
    q_, k_, v_ = (torch.from_numpy(x.view(np.int16) if bits else x) for x in (q, k, v))
    if bits:
        q_, k_, v_ = (x.view(torch.bfloat16) for x in (q_, k_, v_))
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, **grouped)
    return out.view(torch.int16).numpy().view(q.dtype) if bits else out.numpy()


def _numpy_softmax(q: Array, k: Array, v: Array, seed: int) -> Array:
    return softmax_attention(q, k, v, dtype=np.float32).astype(q.dtype, copy=False)


@functools.cache
def _expected_yoso(bits: int) -> Target:
    return Target(f"YOSO-E, {bits} bits", lambda q, k, v, rows: yoso_expectation(q, k, v, bits, rows))


def yoso_e(bits: int) -> Row:
    run = functools.partial(_yoso, hash_bits=bits, expectation=True)
    raw = functools.partial(run, normalize=False)
    return Row(f"yoso-e{bits}", f"YOSO-E, {bits} bits", "", _expected_yoso(bits), run, raw)


def yoso(hashes: int, bits: int) -> Row:
    run = functools.partial(_yoso, num_hashes=hashes, hash_bits=bits)
    raw = functools.partial(run, normalize=False)
    budget = f"{hashes} hash{'es' * (hashes > 1)}"
    return Row(f"yoso-{hashes}x{bits}", f"YOSO, {bits} bits", budget, _expected_yoso(bits), run, raw)


def _yoso(q: Array, k: Array, v: Array, seed: int, **keywords: Any) -> Any:
    return subquad.yoso_attention(q, k, v, seed=seed, **keywords)


# Exact attention: the first of these that can run is what speed-ups are against.
EXACT = (
    Row("sdpa", "softmax, SDPA (torch)", "", SOFTMAX, _torch_sdpa, needs="torch"),
    Row("numpy", "softmax, blocked (numpy)", "", SOFTMAX, _numpy_softmax),
)

ROWS = (
    *EXACT,
    yoso_e(8),
    yoso(16, 8),
    yoso(32, 8),
    yoso(32, 9),
    yoso(64, 9),
    yoso(128, 9),
)


def _family_yoso_e(bits: str) -> Row | None:
    return yoso_e(int(bits)) if 1 <= int(bits) <= MAX_BITS else None


def _family_yoso(hashes: str, bits: str) -> Row | None:
    return yoso(int(hashes), int(bits)) if 1 <= int(hashes) <= MAX_HASHES and 1 <= int(bits) <= MAX_BITS else None


# Names beyond the table: pattern, row for its groups (None where out of range), how to say it.
FAMILIES = (
    (r"yoso-e(\d{1,3})", _family_yoso_e, f"yoso-eBITS (BITS in 1..{MAX_BITS})"),
    (r"yoso-(\d{1,6})x(\d{1,3})", _family_yoso, f"yoso-HASHESxBITS (HASHES in 1..{MAX_HASHES})"),
)


def names() -> str:
    """What --rows takes, in words."""
    return f"{', '.join(row.name for row in ROWS)}, and any {' or '.join(words for _, _, words in FAMILIES)}"


def find_row(name: str) -> Row:
    """The row of that name; UserError if there is none."""
    for row in ROWS:
        if row.name == name:
            return row
    for pattern, make, _ in FAMILIES:
        match = re.fullmatch(pattern, name)
        made = make(*match.groups()) if match else None
        if made is not None:
            return made
    raise UserError(f"unknown row {name!r}: expected {names()}")


def missing(row: Row) -> str | None:
    """Why the row cannot run here, or None if it can. Imports what the row needs."""
    if row.needs is None:
        return None
    try:
        __import__(row.needs)
    except Exception as error:  # a broken install raises more than ImportError
        return f"needs {row.needs} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def exact_row() -> Row:
    """The exact attention that speed-ups are against: the fastest that can run here."""
    return next(row for row in EXACT if missing(row) is None)


def choose(wanted: Sequence[str] | None) -> list[Row]:
    """Rows to run, exact attention first; None for the table with the exact attention that can run here."""
    exact = exact_row()
    if wanted is None:
        return [exact, *(row for row in ROWS if row not in EXACT and missing(row) is None)]
    rows = {row.name: row for row in map(find_row, wanted)}.values()
    for row in rows:
        reason = missing(row)
        if reason:
            raise UserError(f"row {row.name} {reason}: pip install subquad[{row.needs}]")
    return [exact, *(row for row in rows if row.name != exact.name)]
