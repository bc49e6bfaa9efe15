"""Measuring in processes of their own, which start with the thread counts asked for and a clean memory.

The parent sends a request as JSON on stdin and reads the answer from stdout; progress and our own bugs go to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

from .console import Failure, UserError

# Every library that a row may run on reads one of these when it is loaded.
_THREAD_VARIABLES = ("SUBQUAD_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def ask(task: str, request: dict[str, Any], threads: int | None, environment: dict[str, str] | None = None) -> Any:
    """The answer of `task`, "module:function" of this package, to a request, both plain JSON, from a new process."""
    variables = {**os.environ, **(environment or {})}
    if threads is not None:
        variables.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    # The child imports exactly what this process would, and dies of Ctrl-C without a word.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        f"sys.path[:] = {sys.path!r}; from subquad.cli.worker import serve; serve()"
    )
    given = json.dumps([task, request])
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, input=given, stdout=subprocess.PIPE, encoding="utf-8", env=variables)
    if child.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if child.returncode != 0:
        raise Failure(_ending(child.returncode))
    kind, answer = json.loads(child.stdout.splitlines()[-1])
    if kind == "user":
        raise UserError(answer)
    if kind == "failure":
        raise Failure(answer)
    return answer


def _ending(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the measuring process was killed, perhaps for want of memory: try a smaller --seq"
    return f"the measuring process ended with {'signal' if status < 0 else 'status'} {abs(status)}"


def serve() -> None:
    """In the child: run the task that stdin names and print its answer."""
    try:
        task, request = json.load(sys.stdin)
        module, function = task.split(":")
        answer = ["answer", getattr(importlib.import_module(f"subquad.cli.{module}"), function)(request)]
    except UserError as error:
        answer = ["user", str(error)]
    except Failure as error:
        answer = ["failure", str(error)]
    except MemoryError as error:
        answer = ["failure", f"out of memory: {error or 'try a smaller --seq'}"]
    # Last and on a line of its own, whatever a library has printed before.
    print("\n" + json.dumps(answer, allow_nan=False))
