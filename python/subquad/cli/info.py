"""`subquad info`: what is installed, for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import subquad
from subquad.data import load_sample

from . import machine
from .console import print_json, print_text, wrap

_HELP = "what is installed and what it runs on: paste it into a bug report"
_EXAMPLES = """\
examples:
  subquad info
  SUBQUAD_ISA=x86_64_v3 subquad info --json
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help=_HELP, description=_HELP, epilog=_EXAMPLES, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    found = collect()
    if args.json:
        print_json(found)
    else:
        print_text(_text(found))


def collect() -> dict[str, Any]:
    """Every fact, each probed on its own."""
    probe = machine.probe
    return {
        "subquad": subquad.__version__,
        "location": str(Path(subquad.__file__).absolute().parent),
        "cpu": probe(machine.cpu_name),
        "isa": probe(subquad.cpu.isa),
        "isa_available": probe(subquad.cpu.available),
        "isa_compiled": probe(subquad.cpu.compiled),
        "threads": probe(machine.num_threads),
        "cuda": probe(_cuda),
        "system": probe(platform.platform),
        "versions": probe(machine.versions),
        "sample": probe(_sample),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SUBQUAD_")},
    }


def _cuda() -> dict[str, Any]:
    """What the build has kernels for, the devices, and why there is none."""
    cuda = subquad.cuda
    names = ("name", "capability", "multiprocessors", "memory_bytes")
    devices = [dict(zip(names, device, strict=True)) for device in cuda.devices()]
    return {
        "built": cuda.is_built(),
        "architectures": cuda.architectures(),
        "devices": devices,
        "why_none": cuda.why_none(),
    }


def _sample() -> dict[str, Any]:
    sample = load_sample()
    return {"shape": list(sample.q.shape), "heads": list(sample.labels), "provenance": sample.provenance}


def _text(found: dict[str, Any]) -> str:
    """The same for people: one fact a line, what could not be found included."""

    def words(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {text}" for name, text in value.items()) or "none"
        return ", ".join(value) if isinstance(value, list) else str(value)

    threads, sample = found["threads"], found["sample"]
    lines = {
        "subquad": f"{found['subquad']} in {found['location']}",
        "CPU": found["cpu"],
        "kernels": found["isa"],
        "  available": words(found["isa_available"]),
        "  compiled": words(found["isa_compiled"]),
        "threads": f"{threads['count']} ({threads['source']})" if isinstance(threads, dict) else threads,
        "CUDA": _cuda_words(found["cuda"]) if isinstance(found["cuda"], dict) else found["cuda"],
        "system": found["system"],
        "versions": words(found["versions"]),
        "sample": _sample_words(sample) if isinstance(sample, dict) else sample,
        "environment": " ".join(map("=".join, found["environment"].items())) or "no SUBQUAD_* variable is set",
    }
    return "\n".join(wrap(f"{name + ':':<13} {value}", indent=" " * 14) for name, value in lines.items())


def _cuda_words(cuda: dict[str, Any]) -> str:
    if not cuda["devices"]:
        return f"no device: {cuda['why_none']}" + (f" (kernels for {cuda['architectures']})" if cuda["built"] else "")
    names = (
        f"{d['name']} (capability {d['capability'][0]}.{d['capability'][1]}, {d['multiprocessors']} multiprocessors, "
        f"{d['memory_bytes'] >> 30} GiB)"
        for d in cuda["devices"]
    )
    return f"{', '.join(names)}; kernels for {cuda['architectures']}"


def _sample_words(sample: dict[str, Any]) -> str:
    return f"q, k, v {sample['shape']}: {', '.join(sample['heads'])}. {sample['provenance'].splitlines()[0]}"
