"""What this machine can do: copy bandwidth, and the peak of multiply-adds in float32."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

import subquad
from bench.timing import refuse_if_loaded, timed


def name() -> str:
    try:
        lines = open("/proc/cpuinfo").read().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model")))
    except (OSError, StopIteration):
        return platform.machine()


def commit() -> str:
    here = Path(__file__).resolve().parent
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


@cache
def copy_bandwidth(threads: int) -> float:
    """Bytes per second, read plus written, of large copies: `threads` of them at once."""
    from concurrent.futures import ThreadPoolExecutor

    source = [np.ones(1 << 25, np.float32) for _ in range(threads)]
    target = [np.empty_like(s) for s in source]
    with ThreadPoolExecutor(threads) as pool:
        spread = timed(lambda: list(pool.map(np.copyto, target, source)), budget=1.0)
    return 2 * sum(s.nbytes for s in source) / spread.median


@cache
def _peaks(threads: int) -> tuple[float, float]:
    """The best of five runs of peak.cpp: operations and exponentials per second; zeros without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        return 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else ["-O3"]
        subprocess.run([compiler, "-std=c++17", *flags, "-pthread", source, "-o", program], check=True)
        runs = [
            subprocess.run([program, str(threads)], capture_output=True, text=True).stdout.split() for _ in range(5)
        ]
    return max(float(run[0]) for run in runs), max(float(run[1]) for run in runs)


def fma_peak(threads: int) -> float:
    """Float32 operations per second (a multiply-add counts as two) of independent FMAs; 0 without a compiler."""
    return _peaks(threads)[0]


def exp_peak(threads: int) -> float:
    """Exponentials per second to float32 accuracy (polynomial of degree 6) on values in registers; 0 likewise."""
    return _peaks(threads)[1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench machine", description=__doc__)
    parser.parse_args(argv)
    refuse_if_loaded()
    for threads in sorted({1, subquad.cpu.num_threads()}):
        record = {"machine": name(), "isa": subquad.cpu.isa(), "threads": threads}
        record |= {"copy_gb_s": copy_bandwidth(threads) / 1e9, "fma_gflop_s": fma_peak(threads) / 1e9}
        record["exp_g_s"] = exp_peak(threads) / 1e9
        print(json.dumps(record))
    return 0
