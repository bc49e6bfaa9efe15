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
MAX_FEATURES = 4096
MAX_SAMPLES = 1024
MAX_LANDMARKS = 65536
MAX_WINDOW = 10**9
MAX_COLUMNS = 65536
MAX_KEYS = 2**31 - 1


@dataclass(frozen=True)
class Target:
    """What a row estimates: compute(q, k, v, rows) evaluates it in float64 for the query rows `rows`."""

    label: str
    compute: Callable[[Array, Array, Array, Array], Array]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name: as --rows takes it. method, budget: as the table shows them; no budget means exact but for rounding.
    run(q, k, v, seed): the output, in numpy. raw: what is compared with the target, where that is not the output.
    needs: the module that it cannot do without. quadratic: its time grows as N^2, as that of exact attention does.
    prepare: what run takes for given on these q and k, formed before it is timed.
    """

    name: str
    method: str
    budget: str
    target: Target
    run: Callable[[Array, Array, Array, int], Array]
    raw: Callable[[Array, Array, Array, int], Array] | None = None
    needs: str | None = None
    quadratic: bool = False
    prepare: Callable[[Array, Array], Any] | None = None

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


def _exact(q: Array, k: Array, v: Array, seed: int) -> Any:
    return subquad.softmax_attention(q, k, v)


@functools.cache
def _expected_yoso(bits: int) -> Target:
    return Target(f"YOSO-E, {bits} bits", lambda q, k, v, rows: yoso_expectation(q, k, v, bits, rows))


def yoso_e(bits: int) -> Row:
    run = functools.partial(_yoso, hash_bits=bits, expectation=True)
    raw = functools.partial(run, normalize=False)
    return Row(f"yoso-e{bits}", f"YOSO-E, {bits} bits", "", _expected_yoso(bits), run, raw, quadratic=True)


def yoso(hashes: int, bits: int) -> Row:
    run = functools.partial(_yoso, num_hashes=hashes, hash_bits=bits)
    raw = functools.partial(run, normalize=False)
    budget = f"{hashes} hash{'es' * (hashes > 1)}"
    return Row(f"yoso-{hashes}x{bits}", f"YOSO, {bits} bits", budget, _expected_yoso(bits), run, raw)


def _yoso(q: Array, k: Array, v: Array, seed: int, **keywords: Any) -> Any:
    return subquad.yoso_attention(q, k, v, seed=seed, **keywords)


def rfa(features: str, count: int) -> Row:
    """`count` rows of the projection, which give as many positive features and twice as many of the other kinds."""
    budget = f"{count} {'feature' if features == 'positive' else 'pair'}{'s' * (count > 1)}"
    name = f"rfa-{count}" if features == "positive" else f"rfa-{features}-{count}"
    run = functools.partial(_rfa, features=features, num_features=count)
    return Row(name, f"RFA {features}", budget, SOFTMAX, run)


def _rfa(q: Array, k: Array, v: Array, seed: int, **keywords: Any) -> Any:
    return subquad.rfa_attention(q, k, v, seed=seed, **keywords)


def ra(samples: int) -> Row:
    def run(q: Array, k: Array, v: Array, seed: int) -> Any:
        return subquad.randomized_attention(q, k, v, num_samples=samples, seed=seed)

    return Row(f"ra-{samples}", "RA", f"{samples} sample{'s' * (samples > 1)}", SOFTMAX, run, quadratic=True)


def lara(landmarks: int) -> Row:
    """In evaluation: no noise, so that the seed has no part in it."""

    def run(q: Array, k: Array, v: Array, seed: int) -> Any:
        return subquad.lara_attention(q, k, v, num_landmarks=landmarks)

    return Row(f"lara-{landmarks}", "LARA", f"{landmarks} landmark{'s' * (landmarks > 1)}", SOFTMAX, run)


def eva(window: int, chunk: int) -> Row:
    """In evaluation, as LARA."""

    def run(q: Array, k: Array, v: Array, seed: int) -> Any:
        return subquad.eva_attention(q, k, v, window=window, chunk_size=chunk)

    return Row(f"eva-{window}x{chunk}", "EVA", f"window {window}, chunk {chunk}", SOFTMAX, run)


class _Oracle:
    """What a perfect estimate would select, kept for the arrays that it was asked for last."""

    def __init__(self, select: Callable[[Array, Array], Any]):
        self.select = select
        self.arrays: tuple[Array, Array] | None = None
        self.selected: Any = None

    def __call__(self, q: Array, k: Array) -> Any:
        if self.arrays is None or self.arrays[0] is not q or self.arrays[1] is not k:
            self.arrays, self.selected = (q, k), self.select(q, k)
        return self.selected


def sea(columns: int, top_k: int) -> Row:
    """SEA with the exact attention, summed over blocks of keys, in place of the trained estimate."""
    oracle = _Oracle(lambda q, k: subquad.teacher_blocks(q, k, columns)[0])

    def run(q: Array, k: Array, v: Array, seed: int) -> Any:
        probs, group = oracle(q, k), q.shape[1] // max(k.shape[1], 1)
        if group > 1:
            k, v = (np.repeat(x, group, axis=1) for x in (k, v))
        return subquad.sea_attention(q, k, v, probs, top_k=top_k)

    budget = f"{columns} column{'s' * (columns > 1)}, {top_k} key{'s' * (top_k > 1)}"
    return Row(f"sea-{columns}x{top_k}", "SEA (oracle)", budget, SOFTMAX, run, prepare=oracle)


def topk(keys: int) -> Row:
    """The keys of the largest logits."""
    oracle = _Oracle(lambda q, k: _largest(q, k, keys))

    def run(q: Array, k: Array, v: Array, seed: int) -> Any:
        return subquad.sparse_attention(q, k, v, oracle(q, k))

    return Row(f"topk-{keys}", "top-k (oracle)", f"{keys} key{'s' * (keys > 1)}", SOFTMAX, run, prepare=oracle)


def _largest(q: Array, k: Array, keys: int) -> Array:
    """The `keys` keys of the largest logits of every query [B, H, N, keys], a few queries at a time."""
    group, keys = q.shape[1] // max(k.shape[1], 1), min(keys, k.shape[2])
    turned = np.repeat(k.astype(np.float32), group, axis=1).swapaxes(2, 3)
    step = max(1, 2**22 // max(k.shape[2], 1))
    parts = [
        subquad.topk_select(np.ascontiguousarray(q[:, :, n : n + step].astype(np.float32) @ turned), keys)
        for n in range(0, q.shape[2], step)
    ]
    return np.concatenate(parts, axis=2)


# Exact attention: the first of these that can run is what speed-ups are against.
EXACT = (
    Row("sdpa", "softmax, SDPA (torch)", "", SOFTMAX, _torch_sdpa, needs="torch", quadratic=True),
    Row("exact", "softmax (subquad)", "", SOFTMAX, _exact, quadratic=True),
)

ROWS = (
    *EXACT,
    rfa("positive", 64),
    rfa("positive", 256),
    rfa("hyperbolic", 128),
    ra(1),
    ra(4),
    lara(16),
    lara(49),
    eva(64, 64),
    eva(128, 16),
    sea(64, 64),
    sea(128, 128),
    topk(64),
    topk(256),
    yoso_e(8),
    yoso(16, 8),
    yoso(32, 8),
    yoso(32, 9),
    yoso(64, 9),
    yoso(128, 9),
)

# One of every method of linear cost.
LINEAR = ("rfa-256", "lara-49", "eva-64x64", "yoso-16x8")


def _in(low: int, high: int, *numbers: str) -> bool:
    return all(low <= int(number) <= high for number in numbers)


def _family_rfa(features: str | None, count: str) -> Row | None:
    return rfa(features or "positive", int(count)) if _in(1, MAX_FEATURES, count) else None


def _family_ra(samples: str) -> Row | None:
    return ra(int(samples)) if _in(1, MAX_SAMPLES, samples) else None


def _family_lara(landmarks: str) -> Row | None:
    return lara(int(landmarks)) if _in(1, MAX_LANDMARKS, landmarks) else None


def _family_eva(window: str, chunk: str) -> Row | None:
    if not _in(1, MAX_WINDOW, window, chunk) or max(int(window), int(chunk)) % min(int(window), int(chunk)):
        return None
    return eva(int(window), int(chunk))


def _family_sea(columns: str, keys: str) -> Row | None:
    return sea(int(columns), int(keys)) if _in(1, MAX_COLUMNS, columns) and _in(1, MAX_KEYS, keys) else None


def _family_topk(keys: str) -> Row | None:
    return topk(int(keys)) if _in(1, MAX_KEYS, keys) else None


def _family_yoso_e(bits: str) -> Row | None:
    return yoso_e(int(bits)) if _in(1, MAX_BITS, bits) else None


def _family_yoso(hashes: str, bits: str) -> Row | None:
    return yoso(int(hashes), int(bits)) if _in(1, MAX_HASHES, hashes) and _in(1, MAX_BITS, bits) else None


# Names beyond the table: pattern, row for its groups (None where out of range), how to say it.
FAMILIES = (
    (r"rfa-(?:(hyperbolic|trig)-)?(\d{1,6})", _family_rfa,
     f"rfa-F, rfa-hyperbolic-F, rfa-trig-F (F projections in 1..{MAX_FEATURES})"),
    (r"ra-(\d{1,6})", _family_ra, f"ra-SAMPLES (1..{MAX_SAMPLES})"),
    (r"lara-(\d{1,6})", _family_lara, f"lara-LANDMARKS (1..{MAX_LANDMARKS})"),
    (r"eva-(\d{1,10})x(\d{1,10})", _family_eva, "eva-WINDOWxCHUNK (one divides the other)"),
    (r"sea-(\d{1,6})x(\d{1,10})", _family_sea, f"sea-COLUMNSxKEYS (COLUMNS in 1..{MAX_COLUMNS})"),
    (r"topk-(\d{1,10})", _family_topk, "topk-KEYS"),
    (r"yoso-e(\d{1,3})", _family_yoso_e, f"yoso-eBITS (BITS in 1..{MAX_BITS})"),
    (r"yoso-(\d{1,6})x(\d{1,3})", _family_yoso, f"yoso-HASHESxBITS (HASHES in 1..{MAX_HASHES})"),
)  # fmt: skip


def names() -> str:
    """What --rows takes, in words."""
    *most, last = (words for _, _, words in FAMILIES)
    return f"{', '.join(row.name for row in ROWS)}, and any {', '.join(most)} or {last}"


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


def split_names(text: str) -> list[str]:
    """The names of a comma-separated list, each once; UserError for one that is unknown."""
    return list(dict.fromkeys(find_row(name.strip()).name for name in text.split(",")))


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
    """The exact attention that speed-ups are against: that of torch if it can run here, else that of subquad."""
    return next(row for row in EXACT if missing(row) is None)


def choose(wanted: Sequence[str] | None) -> list[Row]:
    """Rows to run, the exact attention that speed-ups are against first; None for the table as far as it can run."""
    exact = exact_row()
    if wanted is None:
        return [exact, *(row for row in ROWS if row is not exact and missing(row) is None)]
    rows = [find_row(name) for name in wanted]
    for row in rows:
        reason = missing(row)
        if reason:
            raise UserError(f"row {row.name} {reason}: pip install subquad[{row.needs}]")
    return [exact, *(row for row in rows if row.name != exact.name)]


def baseline_note(exact: str) -> list[str]:
    """Where torch is absent, what speed-ups are against."""
    return [] if exact == "sdpa" else ["torch cannot be imported: exact attention is that of subquad here."]


def oracle_note(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What rows with an oracle leave out, if there are any among those of a document."""
    if not any("oracle" in row["label"] for row in rows):
        return []
    return [
        "oracle: what is attended to was selected by the exact attention, before the time was taken: what a perfect "
        "estimate or index would give, which has a cost and errors of its own."
    ]
