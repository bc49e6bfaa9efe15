"""What is installed and what it runs on. Every probe answers, whatever is broken; nothing is imported to be asked."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

import subquad

_DISTRIBUTIONS = ("numpy", "torch", "jax", "cupy", "ml_dtypes", "transformers", "safetensors", "matplotlib")


def probe(question: Callable[[], Any]) -> Any:
    """The answer, or a string that says why there is none: a report on a broken install must not break."""
    try:
        return question()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = [line.split(":", 1) for line in file if ":" in line]
        found = {key.strip(): value.strip() for key, value in reversed(fields)}
        name = found.get("model name") or found.get("Hardware")
    except OSError:
        name = None
    return name or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of this Python and of the installed packages that matter here."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception as error:
            found[name] = f"unknown ({type(error).__name__})"
    return found


def num_threads() -> dict[str, Any]:
    """Threads a call uses, and where the number comes from; the order is that of `subquad.cpu.num_threads`."""
    return {"count": subquad.cpu.num_threads(), "source": _threads_source()}


def _threads_source() -> str:
    if os.environ.get("SUBQUAD_NUM_THREADS"):
        return "SUBQUAD_NUM_THREADS"
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return "the OpenMP runtime that is in the process"
    except (OSError, AttributeError):
        pass
    if re.match(r"\s*\+?0*[1-9]", os.environ.get("OMP_NUM_THREADS", "")):
        return "OMP_NUM_THREADS"
    return f"CPUs this process may run on, of {os.cpu_count()}"


def load_note() -> str | None:
    """A sentence if other work keeps the machine busy, so that times mean little."""
    try:
        load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    except (OSError, AttributeError):
        return None
    if load <= 0.5 * cpus:
        return None
    machine = f"{cpus} CPU{'s' * (cpus > 1)}"
    return f"load average {load:.1f} on {machine} at the start: other work was running, so trust no time"


def facts() -> dict[str, Any]:
    """The header of a measurement; asked in the process that measures."""
    threads = {"subquad": subquad.cpu.num_threads()}
    if "torch" in sys.modules:
        threads["torch"] = sys.modules["torch"].get_num_threads()
    return {
        "cpu": probe(cpu_name),
        "isa": subquad.cpu.isa(),
        "threads": threads,
        "versions": {name: text for name, text in versions().items() if name in ("python", "numpy", *threads)},
        "note": probe(load_note),
    }


def facts_line(found: dict[str, Any]) -> str:
    threads = ", ".join(f"{name} {count}" for name, count in found["threads"].items())
    installed = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    return f"{found['cpu']}, kernels {found['isa']}, threads: {threads}; {installed}"
