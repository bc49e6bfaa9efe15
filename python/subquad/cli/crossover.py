"""`subquad crossover`: the number of tokens from which a method is faster than exact attention on this machine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import subquad

from . import console, machine, measure, methods, worker
from .compare import library
from .console import Progress, UserError, integer, wrap
from .inputs import MAX_DIM

_HELP = "the number of tokens N from which a method is faster than exact attention on this machine"
_PAIRS = 41
_FEWEST_PAIRS = 5
_ENOUGH_SECONDS = 0.25
_RESOLUTION = 16  # the search ends when N is known to a part of itself, or to as many tokens
_QUADRATIC_MAX = 2048
_EXAMPLES = f"""\
{wrap(f"rows: {methods.names()}")}
q, k, v are random normal tokens [1, heads, N, dim] in float32. Exact attention is torch's SDPA where torch can be
imported, else subquad.softmax_attention. A method whose time grows as N^2 too is only timed up to N = {_QUADRATIC_MAX}.

examples:
  subquad crossover
  subquad crossover --dim 32 --heads 12 --rows eva-128x16,yoso-16x8,yoso-32x9 --max 16384
  subquad crossover --threads 1 --json
"""


class Point(NamedTuple):
    """Medians over pairs of calls at one N; ratio > 1: the row is faster than exact attention."""

    n: int
    exact_ms: float
    row_ms: float
    ratio: float


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("crossover", help=_HELP, description=_HELP, epilog=_EXAMPLES, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--dim", type=integer(1, MAX_DIM), default=64, metavar="D", help="head dimension (default 64)")
    parser.add_argument("--heads", type=integer(1), default=8, metavar="H", help="heads (default 8)")
    parser.add_argument("--min", type=integer(1), default=64, metavar="N", help="smallest N (default 64)")
    parser.add_argument("--max", type=integer(1), default=8192, metavar="N", help="largest N (default 8192)")
    parser.add_argument("--rows", metavar="NAME,...", default=",".join(methods.LINEAR),
                        help="what to run, see below (default %(default)s)")  # fmt: skip
    console.add_common_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.min > args.max:
        raise UserError(f"--min: expected at most --max = {args.max}, got {args.min}")
    rows = methods.split_names(args.rows)
    settings = {"dim": args.dim, "heads": args.heads, "min": args.min, "max": args.max, "seed": args.seed}
    found = worker.ask("crossover:find_crossings", {**settings, "rows": rows}, args.threads)
    document = {"command": "crossover", "subquad": subquad.__version__, **settings, **found}
    if args.json:
        console.print_json(document)
    else:
        console.print_text(_text(document))


def find_crossings(request: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the search for every row."""
    exact, *rows = methods.choose(request["rows"])
    if not rows:
        raise UserError(f"--rows: expected other rows than {exact.name}, which they are compared with")
    facts = library(machine.facts)
    progress = Progress()
    answers = []
    for row in rows:

        def at(n: int, row: methods.Row = row) -> Point:
            progress.say(f"{row.name}: N = {n}")
            return _pairs(exact, row, n, request)

        low, high = request["min"], request["max"]
        status, n, points = ratios(at, low, high) if row.quadratic else search(at, low, high)
        shown = [{**p._asdict()} for p in sorted(points.values())]
        answers.append({"name": row.name, "label": row.label, "status": status, "n": n, "points": shown})
    progress.close()
    return {"machine": facts, "exact": {"name": exact.name, "label": exact.label}, "rows": answers}


def _pairs(exact: methods.Row, row: methods.Row, n: int, request: dict[str, Any]) -> Point:
    """Both calls in alternation, until the medians are steady enough or the time is up."""
    random = np.random.default_rng(request["seed"] % 2**64)
    q, k, v = random.standard_normal((3, 1, request["heads"], n, request["dim"]), np.float32)
    calls = [lambda r=r: library(lambda: r.run(q, k, v, request["seed"])) for r in (exact, row)]
    for call in calls:
        call()
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < _PAIRS and (len(pairs) < _FEWEST_PAIRS or time.perf_counter() - start < _ENOUGH_SECONDS):
        pairs.append((measure.seconds(calls[0]), measure.seconds(calls[1])))
    exact_ms, row_ms = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    return Point(n, exact_ms, row_ms, statistics.median(a / b for a, b in pairs))


def search(at: Callable[[int], Point], low: int, high: int) -> tuple[str, int | None, dict[int, Point]]:
    """Where the ratio of a point passes 1 on the way up: doubling, then halving the interval.

    Returns status, N and the points measured. "crossed": the row is faster at N, and slower at the next smaller N
    measured; "always": faster at `low` already; "never": not faster up to `high`. A single fast point with a slow one
    at twice its N is taken for noise.
    """
    ladder = doublings(low, high)
    points: dict[int, Point] = {}

    def faster(n: int) -> bool:
        if n not in points:
            points[n] = at(n)
        return points[n].ratio > 1

    for i, n in enumerate(ladder):
        if faster(n) and faster(ladder[min(i + 1, len(ladder) - 1)]):
            break
    else:
        return "never", None, points
    if i == 0:
        return "always", n, points
    below = ladder[i - 1]
    while n - below > max(_RESOLUTION, n // _RESOLUTION):
        middle = (below + n) // 2
        below, n = (below, middle) if faster(middle) else (middle, n)
    return "crossed", n, points


def ratios(at: Callable[[int], Point], low: int, high: int) -> tuple[str, None, dict[int, Point]]:
    """The points of a row whose time grows as that of exact attention does, so that there is no crossing to search."""
    return "quadratic", None, {n: at(n) for n in doublings(low, max(low, min(high, _QUADRATIC_MAX)))}


def doublings(low: int, high: int) -> list[int]:
    """low, its doublings below high, and high."""
    ladder = [low]
    while ladder[-1] < high:
        ladder.append(min(ladder[-1] * 2, high))
    return ladder


def _text(document: dict[str, Any]) -> str:
    exact = document["exact"]
    shape = f"[1, {document['heads']}, N, {document['dim']}] float32, N in {document['min']}..{document['max']}"
    head = f"subquad {document['subquad']} crossover: random q, k, v {shape}, seed {document['seed']}"
    parts = [wrap(head), wrap(machine.facts_line(document["machine"])), f"exact attention: {exact['label']}", ""]
    for row in document["rows"]:
        cells = [
            (str(p["n"]), console.milliseconds(p["exact_ms"]), console.milliseconds(p["row_ms"]), f"{p['ratio']:.2f}x")
            for p in _around(row)
        ]
        parts += [f"{row['label']}: {_verdict(row, document)}", ""]
        parts += [console.table(("     N", f"{exact['name']} ms", f"{row['name']} ms", "speed-up"), cells, left=0), ""]
    notes = [
        f"Medians of {_FEWEST_PAIRS} to {_PAIRS} pairs of calls in alternation, after a warm-up; N is known to about "
        f"1/{_RESOLUTION} of itself.",
        "How well a method approximates softmax attention, if it does, is another question: see `subquad compare`.",
        *methods.baseline_note(exact["name"]),
        *methods.oracle_note(document["rows"]),
    ]
    if document["machine"]["note"]:
        notes.append(f"{document['machine']['note']}.")
    return "\n".join(parts + [wrap(note, indent="  ") for note in notes])


def _verdict(row: dict[str, Any], document: dict[str, Any]) -> str:
    if row["status"] == "quadratic":
        last = row["points"][-1]
        return f"time grows as N^2 too, {last['ratio']:.2f}x as fast at N = {last['n']}"
    if row["status"] == "never":
        return f"not within --max {document['max']}"
    if row["status"] == "always":
        return f"faster at --min {document['min']} already"
    return f"faster from N = {row['n']}"


def _around(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The points around the crossing, and for a row without one the largest."""
    if row["n"] is None:
        return list(row["points"][-4:])
    return [p for p in row["points"] if row["n"] / 4 <= p["n"] <= row["n"] * 4]
