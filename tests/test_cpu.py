"""The rows of CPU kernels: which there are, how one is chosen."""

import os
import subprocess
import sys

import pytest

import subquad


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_every_compiled_row_is_tested():
    absent = [row for row in subquad.cpu.compiled() if row not in subquad.cpu.available()]
    if absent:
        pytest.skip(f"this machine cannot run {', '.join(absent)}: no test here has run on it")


def test_the_best_row_is_the_default():
    chosen = run("import subquad; print(subquad.cpu.isa())", SUBQUAD_ISA="")
    assert chosen.stdout.strip() == subquad.cpu.available()[-1]


@pytest.mark.parametrize("row", subquad.cpu.available())
def test_the_environment_forces_a_row(row):
    assert run("import subquad; print(subquad.cpu.isa())", SUBQUAD_ISA=row).stdout.strip() == row


def test_an_unknown_row_in_the_environment_raises_on_first_use():
    script = "import numpy as np, subquad; x = np.ones((1, 1, 2, 4), 'f4'); subquad.yoso_attention(x, x, x)"
    result = run(script, SUBQUAD_ISA="x86_64_v9")
    assert result.returncode != 0
    assert "[cpu] SUBQUAD_ISA: expected one of " in result.stderr
    assert 'got "x86_64_v9"' in result.stderr


def test_scratch_memory_can_be_given_back():
    import numpy as np

    x = np.ones((1, 2, 300, 64), np.float32)
    first = subquad.yoso_attention(x, x, x)
    subquad.cpu.free_scratch()
    subquad.cpu.free_scratch()
    np.testing.assert_array_equal(first, subquad.yoso_attention(x, x, x))
