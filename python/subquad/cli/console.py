"""What the commands share: errors, numbers from arguments, tables, JSON and progress."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

WIDTH = 100
MAX_THREADS = 1024


class UserError(Exception):
    """Wrong usage or input; the message is one sentence for the user."""

    status = 2


class Failure(Exception):
    """A measurement that could not be finished, through no fault of the arguments."""

    status = 1


def integer(low: int | None = None, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: an integer in low..high."""
    if low is None:
        expected = "an integer"
    else:
        expected = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (low is not None and value < low) or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=integer(), default=0, metavar="S", help="seed of every random draw (default 0)")
    parser.add_argument("--threads", type=integer(1, MAX_THREADS), metavar="T",
                        help="threads for every row (default: what each library chooses)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def print_text(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_json(document: Any) -> None:
    print_text(json.dumps(document, indent=2, allow_nan=False))


def finite(value: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return float(value) if math.isfinite(value) else None


def wrap(text: str, indent: str = "") -> str:
    """A paragraph filled to the width of a table; lines after the first are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first `left` of them to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for line in (heads, ["-" * width for width in widths], *rows):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def milliseconds(value: float) -> str:
    """Three significant digits or more, without an exponent."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}"


class Progress:
    """One line on stderr that says what is being done, only where somebody watches; gone when it is closed."""

    def __init__(self) -> None:
        self.watched = sys.stderr is not None and sys.stderr.isatty()

    def say(self, text: str) -> None:
        if self.watched:
            sys.stderr.write(f"\r\x1b[K{text[: WIDTH - 1]}")
            sys.stderr.flush()

    def close(self) -> None:
        self.say("")
