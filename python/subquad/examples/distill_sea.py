"""A dense language model, its distillation into SEA, and the same for RFA: `python -m subquad.examples.distill_sea`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..cli.console import UserError, finite, integer, print_json, print_text, table, wrap

_ABOUT = """\
Trains a small causal transformer over the bytes of a text, replaces its attention by SEA and by RFA, and tunes both for
equally many steps with the dense model as their teacher. Prints the perplexities on the held-out end of the text."""

_HONEST = """\
What this shows: that the layers, the losses and the conversion work together, on the smallest scale at which they do.
What it does not: how good the methods are. The built-in text is one chapter of 11 kB, which any model learns by heart
within minutes; windows are so short that exact attention is faster; and a student goes on learning from the text, so
that it may pass its teacher. Use --text and larger sizes for more."""

# By default, with --quick, at least, and what it is.
_SIZES = {
    "steps": (450, 12, 0, "training steps of the dense model"),
    "student_steps": (200, 4, 0, "steps of each student"),
    "batch": (16, 4, 1, "windows a step"),
    "width": (64, 16, 1, "features of a token"),
    "heads": (4, 2, 1, "attention heads"),
    "layers": (2, 1, 1, "layers"),
    "context": (128, 32, 2, "bytes a window"),
    "top_k": (16, 8, 1, "SEA: keys a query"),
    "columns": (32, 8, 4, "SEA: columns of the estimated matrix, a multiple of 4"),
    "features": (64, 8, 1, "RFA: random features"),
}


def _rate(text: str) -> float:
    """A type for argparse: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m subquad.examples.distill_sea", description=_ABOUT, epilog=_HONEST, allow_abbrev=False
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a file, read as bytes (default: a built-in chapter)")
    for name, (default, quick, low, what) in _SIZES.items():
        said = f"{what} (default {default}, with --quick {quick})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=integer(low), metavar="N", help=said)
    parser.add_argument("--rate", type=_rate, default=3e-3, metavar="R",
                        help="learning rate, of which students use a quarter (default 3e-3)")  # fmt: skip
    parser.add_argument("--seed", type=integer(0, 2**31), default=0, metavar="S", help="of every draw (default 0)")
    parser.add_argument("--threads", type=integer(1, 1024), metavar="T", help="threads of torch (default: its choice)")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, which shows nothing but that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    args = _parser().parse_args(argv)
    for name, (default, quick, *_) in _SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else default)
    return args


def _bytes(path: Path | None, context: int) -> tuple[str, bytes]:
    """The name and the bytes of the text."""
    try:
        if path is None:
            name, data = "built-in", resources.files("subquad.data").joinpath("text.txt").read_bytes()
        else:
            name, data = str(path), path.read_bytes()
    except OSError as error:
        raise UserError(f"--text: {path} cannot be read: {error.strerror}") from None
    least = 10 * context
    if len(data) < least:
        raise UserError(f"--text: expected at least {least} bytes, ten windows of --context {context}, got {len(data)}")
    return name, data


class _Reporter:
    """Progress on stderr: a line for every tenth of a training."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.every, self.begin = name, steps, max(1, steps // 10), time.perf_counter()

    def __call__(self, step: int, loss: float) -> None:
        if step % self.every == 0 or step == self.steps:
            seconds = time.perf_counter() - self.begin
            print(
                f"{self.name}: step {step}/{self.steps}, loss {loss:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True
            )


def _run(args: argparse.Namespace) -> dict[str, Any]:
    name, data = _bytes(args.text, args.context)
    if args.width % args.heads:
        raise UserError(f"--width: expected a multiple of --heads {args.heads}, got {args.width}")
    if args.columns % 4:
        raise UserError(f"--columns: expected a multiple of 4, got {args.columns}")
    try:
        import torch
    except ImportError as error:
        raise UserError(f"this example needs torch, which cannot be imported: {error}") from None
    from . import language_model as lm

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    held_out = max(args.context, len(text) // 10)
    learned, unseen = text[:-held_out], text[-held_out:]
    sizes = lm.Sizes(args.width, args.heads, args.layers, args.context, args.top_k, args.columns, args.features)
    rows: list[dict[str, Any]] = []

    def taught(label: str, model: Any, loss: Any, steps: int, rate: float) -> None:
        before, begin = lm.perplexity(model, unseen, args.context), time.perf_counter()
        lm.train(
            model, loss, learned, steps=steps, batch=args.batch, context=args.context, rate=rate, seed=args.seed + 1,
            report=_Reporter(label, steps),
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        after = lm.perplexity(model, unseen, args.context)
        rows.append({"model": label, "steps": steps, "seconds": seconds, "before": before, "perplexity": after})

    dense = lm.LanguageModel(sizes)
    taught("dense", dense, lambda ids: lm.task_loss(dense(ids).logits, ids), args.steps, args.rate)
    sea = lm.to_sea(dense, sizes, args.seed)
    taught("SEA", sea, lambda ids: lm.distillation(sea, dense, ids, True), args.student_steps, args.rate / 4)
    rfa = lm.to_rfa(dense, sizes, args.seed)
    taught("RFA", rfa, lambda ids: lm.distillation(rfa, dense, ids, False), args.student_steps, args.rate / 4)
    options = {key: value for key, value in vars(args).items() if key not in ("text", "json")}
    corpus = {"name": name, "bytes": len(text), "held_out": held_out}
    return {"text": corpus, "options": options, "threads": torch.get_num_threads(), "models": rows}


def _text(document: dict[str, Any]) -> str:
    corpus, options = document["text"], document["options"]
    lines = [
        f"text {corpus['name']}: {corpus['bytes']} bytes; perplexity per byte of the last {corpus['held_out']}",
        f"windows of {options['context']} bytes; SEA: {options['top_k']} keys a query, {options['columns']} columns; "
        f"RFA: {options['features']} features",
        "",
    ]
    rows = [
        [row["model"], str(row["steps"]), f"{row['seconds']:.1f}", f"{row['before']:.3f}", f"{row['perplexity']:.3f}"]
        for row in document["models"]
    ]
    heads = ["model", "steps", "seconds", "perplexity before", "perplexity after"]
    return "\n".join([*lines, table(heads, rows), "", wrap(_HONEST.replace("\n", " "))])


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        document = _run(args)
    except UserError as error:
        print(f"distill_sea: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("\ndistill_sea: interrupted", file=sys.stderr)
        return 130
    if args.json:
        rows = [row | {name: finite(row[name]) for name in ("before", "perplexity")} for row in document["models"]]
        print_json(document | {"models": rows})
    else:
        print_text(_text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
