"""The picture of `subquad compare --plot`: error against time, both on logarithmic axes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .console import UserError


def check(path: str) -> None:
    """UserError, before any long work, if the picture could not be drawn or written in the end."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}): pip install subquad[plot]") from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    target = Path(path)
    if target.suffix[1:].lower() not in kinds:
        raise UserError(f"--plot: expected a file name that ends in .png or another format of matplotlib, got {path!r}")
    if not target.parent.is_dir():
        raise UserError(f"--plot: no such folder: {target.parent}")
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UserError(f"--plot: cannot write {path}")


def draw(document: dict[str, Any], path: str) -> None:
    """One line per method through its budgets; what has no budget errs by rounding alone: a vertical line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="time per call [ms]")
    axes.set_ylabel("relative l2 error against what the row estimates")
    sampled = [row for row in document["rows"] if row["budget"] and row["error"]]
    for method in dict.fromkeys(row["method"] for row in sampled):
        rows = sorted((row for row in sampled if row["method"] == method), key=lambda row: row["time_ms"])
        # errors against another target than softmax attention do not compare with the others: broken lines
        own = rows[0]["softmax_error"] is None
        label = f"{method} (against {rows[0]['estimates']})" if own else method
        axes.plot([row["time_ms"] for row in rows], [row["error"] for row in rows], "s:" if own else "o-", label=label)
        for row in rows:
            axes.annotate(row["budget"], (row["time_ms"], row["error"]), xytext=(5, 5), textcoords="offset points",
                          fontsize="small")  # fmt: skip
    dense = [row for row in document["rows"] if not row["budget"]]
    for i, row in enumerate(dense):
        axes.axvline(row["time_ms"], linestyle=("--", ":", "-.")[i % 3], color="0.4", label=row["label"])
    given, machine = document["input"], document["machine"]
    threads = machine["threads"]["subquad"]
    axes.set_title(f"{given['source']}, q {given['q']} {given['dtype']}\n{machine['cpu']}, {machine['isa']}, "
                   f"{threads} thread{'s' * (threads > 1)}", fontsize="medium")  # fmt: skip
    axes.margins(x=0.15, y=0.1)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"--plot: cannot write {path}: {error}") from None
