"""Threads: the same bits for any number of them, who decides the number, and survival of fork and of many callers."""

import importlib.util
import os
import subprocess
import sys

import pytest

PREAMBLE = """
import hashlib, os, signal, threading
import numpy as np
import subquad

draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal((1, 2, 300, 32), dtype=np.float32) for _ in range(3))

def digest(_=None):
    out = subquad.yoso_attention(q, k, v, num_hashes=8, hash_bits=6, seed=1)
    return hashlib.sha256(out.tobytes()).hexdigest()

def in_child(body):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang is a failure, not a wait
        os._exit(0 if body() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

# Loading torch brings an OpenMP runtime whose threads are then used; the sum makes it start them.
LOAD_TORCH = "import torch; torch.ones(10**6).sum()"

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
both_engines = pytest.mark.parametrize(
    "engine", [pytest.param("", id="own"), pytest.param(LOAD_TORCH, id="torch", marks=needs_torch)]
)


def run(*lines, **variables):
    """What the lines print, in a process of its own whose thread variables are only those given."""
    environment = {name: text for name, text in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([PREAMBLE, *lines])],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@both_engines
def test_same_bits_for_any_number_of_threads(engine):
    digests = {run(engine, "print(digest())", SUBQUAD_NUM_THREADS=str(count)) for count in (1, 2, 3)}
    assert len(digests) == 1


def test_own_variable():
    assert run("print(subquad.cpu.num_threads())", SUBQUAD_NUM_THREADS="3", OMP_NUM_THREADS="2") == "3"


@pytest.mark.parametrize("wrong", ["0", "-2", "many", "2.0"])
def test_wrong_own_variable_is_an_error(wrong):
    lines = ["try: digest()", "except ValueError as error: print(error)"]
    message = f'[cpu] SUBQUAD_NUM_THREADS: expected a positive integer, got "{wrong}"'
    assert run(*lines, SUBQUAD_NUM_THREADS=wrong) == message


@pytest.mark.parametrize("text, count", [("3", "3"), ("2,1", "2")])
def test_openmp_variable(text, count):
    assert run("print(subquad.cpu.num_threads())", OMP_NUM_THREADS=text) == count


def test_affinity():
    lines = ["os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", "print(subquad.cpu.num_threads(), digest())"]
    assert run(*lines) == f"1 {run('print(digest())')}"


@needs_torch
def test_torch_decides_when_it_is_loaded():
    lines = [
        "import torch",
        "for n in (1, 3, 2):",
        "    torch.set_num_threads(n)",
        "    print(subquad.cpu.num_threads())",
    ]
    assert run(*lines, "digest()").split() == ["1", "3", "2"]
    assert run(*lines, SUBQUAD_NUM_THREADS="4").split() == ["4", "4", "4"]


@needs_torch
def test_torch_loaded_after_the_first_call():
    lines = ["before = digest()", LOAD_TORCH, "torch.set_num_threads(3)"]
    assert run(*lines, "print(subquad.cpu.num_threads(), digest() == before)") == "3 True"


@pytest.mark.parametrize(
    "load, started", [pytest.param("", "1", id="own"), pytest.param(LOAD_TORCH, "0", id="torch", marks=needs_torch)]
)
def test_torch_threads_are_shared(load, started):
    lines = [
        load,
        "threads = lambda: len(os.listdir('/proc/self/task'))",
        "before = threads(); digest(); print(threads() - before)",
    ]
    assert run(*lines, OMP_NUM_THREADS="2") == started


@both_engines
def test_forked_child(engine):
    lines = [engine, "before = digest()", "print(in_child(lambda: digest() == before), digest() == before)"]
    assert run(*lines, SUBQUAD_NUM_THREADS="2") == "True True"


@both_engines
def test_child_of_a_forked_child(engine):
    lines = [engine, "before = digest()", "same = lambda: digest() == before"]
    assert run(*lines, "print(in_child(lambda: same() and in_child(same)))", SUBQUAD_NUM_THREADS="2") == "True"


@both_engines
def test_fork_while_another_thread_calls(engine):
    lines = [
        engine,
        "before, stop = digest(), threading.Event()",
        "def work():",
        "    while not stop.is_set(): digest()",
        "thread = threading.Thread(target=work); thread.start()",
        "print(all(in_child(lambda: digest() == before) for _ in range(5)))",
        "stop.set(); thread.join()",
    ]
    assert run(*lines, SUBQUAD_NUM_THREADS="2") == "True"


@both_engines
def test_multiprocessing_pool_of_forked_workers(engine):
    lines = [
        engine,
        "import multiprocessing",
        "before = digest()",
        "with multiprocessing.get_context('fork').Pool(2) as pool: print(set(pool.map(digest, range(8))) == {before})",
    ]
    assert run(*lines, SUBQUAD_NUM_THREADS="2") == "True"


@both_engines
def test_several_python_threads_at_once(engine):
    lines = [
        engine,
        "from concurrent.futures import ThreadPoolExecutor",
        "before = digest()",
        "with ThreadPoolExecutor(4) as pool: print(set(pool.map(digest, range(80))) == {before})",
    ]
    assert run(*lines, SUBQUAD_NUM_THREADS="3") == "True"
