"""Running `python -m subquad` as a user does, and arrays to run it on."""

import os
import re
import subprocess
import sys

import numpy as np


def start(arguments, folder, hidden, variables):
    path = os.pathsep.join(filter(None, [str(hidden or ""), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(
        [sys.executable, "-m", "subquad", *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def answer(done):
    """stdout of a command that succeeded and had nothing to say on stderr."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refusal(done):
    """The sentence of a command that refused."""
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert re.match(r"subquad( \w+)?: error: ", last)
    return last.split("error: ", 1)[1]


def random_arrays(dtype=np.float32, heads_kv=2, seq_k=40):
    random = np.random.default_rng(0)
    shapes = {"q": (2, 4, 40, 8), "k": (2, heads_kv, seq_k, 8), "v": (2, heads_kv, seq_k, 12)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
