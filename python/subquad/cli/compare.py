"""`subquad compare`: time, memory and error of every method against exact attention, on real q, k and v."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

import subquad

from . import console, machine, measure, methods, plot, worker
from .console import Progress, UserError, finite, integer, wrap
from .inputs import DTYPES, Inputs, load_inputs

_HELP = "time, memory and error of every method against exact attention, on real q, k and v"
_EXAMPLES = f"""\
{wrap(f"rows: {methods.names()}")}
Speed-ups are against exact attention: torch's SDPA where torch can be imported, else subquad.softmax_attention.

examples:
  subquad compare                                       the built-in sample, all of its 2048 tokens
  subquad compare --seq 512 --rows lara-49,rfa-512,rfa-trig-256,yoso-64x9
  subquad compare --input qkv.npz --dtype bfloat16      arrays q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, E]
  subquad compare --json --plot error-against-time.png > result.json
"""
_ERROR_ROWS = 2048
_WARM_UP_TOKENS = 64


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("compare", help=_HELP, description=_HELP, epilog=_EXAMPLES, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--input", metavar="FILE", help=".npz or .safetensors with q, k, v (default: the sample)")
    parser.add_argument("--seq", type=integer(1), metavar="N", help="the first N tokens only")
    parser.add_argument("--rows", metavar="NAME,...", help="what to run, see below (default: every row of the table)")
    parser.add_argument("--dtype", choices=DTYPES, help="convert q, k, v (default: that of the file; sample: float32)")
    parser.add_argument("--repeats", type=integer(1), default=9, metavar="R", help="timed calls of a row (default 9)")
    parser.add_argument("--plot", metavar="FILE", help="also draw error against time, for example out.png (matplotlib)")
    console.add_common_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    wanted = None if args.rows is None else methods.split_names(args.rows)
    if args.plot is not None:
        plot.check(args.plot)
    inputs = load_inputs(args.input, args.seq, args.dtype)
    request = {"path": args.input, "seq": args.seq, "dtype": args.dtype, "seed": args.seed, "repeats": args.repeats}
    found = worker.ask("compare:measure_rows", {**request, "rows": wanted}, args.threads)
    progress = Progress()
    for i, row in enumerate(found["rows"]):
        progress.say(f"memory {i + 1}/{len(found['rows'])}: {row['name']}")
        # Blocks of any size go back to the system when they are freed, so that only what lives at once is counted.
        mapped = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        peak = worker.ask("compare:measure_memory", {**request, "row": row["name"]}, args.threads, mapped)
        row["memory_mib"] = None if peak is None else round(peak / 2**20, 3)
    progress.close()
    document = _document(args, inputs, found)
    if args.plot is not None:
        plot.draw(document, args.plot)
    if args.json:
        console.print_json(document)
    else:
        console.print_text(_text(document))


def _document(args: argparse.Namespace, inputs: Inputs, found: dict[str, Any]) -> dict[str, Any]:
    shapes = {name: list(getattr(inputs, name).shape) for name in ("q", "k", "v")}
    return {
        "command": "compare",
        "subquad": subquad.__version__,
        "machine": found["machine"],
        "input": {"source": inputs.source, **shapes, "dtype": inputs.q.dtype.name},
        "seed": args.seed,
        "repeats": args.repeats,
        "exact": found["rows"][0]["name"],
        "error_rows": min(inputs.q.shape[2], _ERROR_ROWS),
        "rows": found["rows"],
    }


def measure_rows(request: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: times and errors of the rows, exact attention first."""
    rows = methods.choose(request["rows"])
    inputs = load_inputs(request["path"], request["seq"], request["dtype"])
    facts = library(machine.facts)
    progress = Progress()
    calls = [_call(row, inputs, request["seed"]) for row in rows]
    repeats = request["repeats"]
    times = measure.in_turn(calls, repeats, lambda turn: progress.say(f"time: round {turn}/{repeats}"))
    errors = _errors(rows, inputs, request["seed"], progress)
    progress.close()
    exact = measure.quartiles(times[0])[1]
    answers = []
    for row, spent, wrong in zip(rows, times, errors, strict=True):
        low, middle, high = measure.quartiles(spent)
        answers.append({
            "name": row.name, "label": row.label, "method": row.method, "budget": row.budget,
            "estimates": row.target.label, "time_ms": middle * 1e3, "time_quartiles_ms": [low * 1e3, high * 1e3],
            "speedup": exact / middle, **wrong,
        })  # fmt: skip
    return {"machine": facts, "rows": answers}


def measure_memory(request: dict[str, Any]) -> int | None:
    """In a process of its own: what one call of one row adds to the peak resident memory, in bytes."""
    row = methods.find_row(request["row"])
    inputs = load_inputs(request["path"], request["seq"], request["dtype"])
    few = {name: getattr(inputs, name)[:, :, :_WARM_UP_TOKENS].copy() for name in ("q", "k", "v")}
    _call(row, inputs._replace(**few), request["seed"])()
    return measure.peak_bytes(_call(row, inputs, request["seed"]))


def library(call: Callable[[], Any]) -> Any:
    """The result of a call into the library; what it refuses becomes a sentence for the user."""
    try:
        return call()
    except (ValueError, TypeError, NotImplementedError) as error:
        if str(error).startswith("["):
            raise UserError(str(error)) from None
        raise


def _call(row: methods.Row, inputs: Inputs, seed: int) -> Callable[[], Any]:
    if row.prepare is not None:
        prepare = row.prepare
        library(lambda: prepare(inputs.q, inputs.k))
    return lambda: library(lambda: row.run(inputs.q, inputs.k, inputs.v, seed))


def _errors(rows: list[methods.Row], inputs: Inputs, seed: int, progress: Progress) -> list[dict[str, float | None]]:
    """Per row: the error against what it estimates, the same as softmax_error where that is softmax, the row cosine."""
    some = measure.some_rows(inputs.q.shape[2], _ERROR_ROWS)
    expected = {}
    for target in dict.fromkeys([methods.SOFTMAX, *(row.target for row in rows)]):
        progress.say(f"reference in float64: {target.label}")
        expected[target] = target.compute(*inputs[:3], some)
    errors = []
    for row in rows:
        progress.say(f"error: {row.name}")
        estimate, out = (np.asarray(f(*inputs[:3], seed))[:, :, some] for f in (row.estimate, row.run))
        error = finite(measure.relative_error(estimate, expected[row.target]))
        errors.append({
            "error": error,
            "softmax_error": error if row.target is methods.SOFTMAX else None,
            "softmax_cosine": finite(measure.mean_cosine(out, expected[methods.SOFTMAX])),
        })  # fmt: skip
    return errors


def _text(document: dict[str, Any]) -> str:
    given, rows = document["input"], document["rows"]
    alike = given["q"] == given["k"] == given["v"]
    shape = f"q, k, v {given['q']}" if alike else f"q {given['q']}, k {given['k']}, v {given['v']}"
    where = f"{given['source']}, {shape} {given['dtype']}, seed {document['seed']}"
    heads = ("row", "method", "time ms", "speed-up", "memory MiB", "error", "softmax cos")
    cells = [
        (
            row["name"], row["label"], console.milliseconds(row["time_ms"]), f"{row['speedup']:.2f}x",
            _number(row["memory_mib"], ".1f"), _number(row["error"], ".1e" if not row["budget"] else ".3f"),
            _number(row["softmax_cosine"], ".4f"),
        )
        for row in rows
    ]  # fmt: skip
    parts = [
        wrap(f"subquad {document['subquad']} compare: {where}"),
        wrap(machine.facts_line(document["machine"])),
        "",
        console.table(heads, cells, left=2),
        "",
    ]
    return "\n".join(parts + [wrap(note, indent="  ") for note in _notes(document)])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _notes(document: dict[str, Any]) -> list[str]:
    rows, exact, repeats = document["rows"], document["rows"][0], document["repeats"]
    seq = document["input"]["q"][2]
    part = "" if document["error_rows"] == seq else f" over {document['error_rows']} of {seq} queries, evenly spaced"
    notes = [
        f"time: median of {repeats} call{'s' * (repeats > 1)} after a warm-up, rows taking turns; speed-up: against "
        f"{exact['name']}.",
        "memory: growth of peak resident memory in one call in a fresh process, output and scratch included, to about "
        "0.5 MiB.",
        f"error: relative l2 distance{part} from what the row estimates, in float64: softmax attention, but for YOSO "
        "its expectation YOSO-E of the same bits (sums before their rows are normalised), so that errors of YOSO "
        "compare with each other only. An output of zeros has an error of 1.",
        "softmax cos: mean cosine of output rows with exact softmax attention. YOSO is an attention of its own, not an "
        "approximation of softmax: its cosine is no error.",
        *methods.baseline_note(exact["name"]),
    ]
    notes += methods.oracle_note(rows)
    if any(row["memory_mib"] is None for row in rows):
        notes.append("memory: -: this system does not tell a process its peak memory.")
    if document["machine"]["note"]:
        notes.append(f"{document['machine']['note']}.")
    return notes
