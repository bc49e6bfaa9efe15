"""The one command for a machine with a GPU, where there is none: its sections on made-up tools."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "gpu"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")
ARGS = Namespace(arch="90a-real", budget=300.0, limit=570.0, chosen=["tests", "sanitizer"])


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    loader = SourceFileLoader("gpu_command", str(SCRIPT))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_command", loader))
    loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    monkeypatch.setattr(module, "TOOLKITS", [])
    return module


@pytest.fixture
def run(gpu):
    return gpu.Run(limit=100, dry=False)


def tool(folder, name, body, monkeypatch):
    """A program of that name on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def command_line(*options, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=os.environ | environment
    )


# The command line


def test_a_dry_run_says_every_command(tmp_path):
    result = command_line("--dry-run", "--arch", "90a-real", OUT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    for words in (
        "--no-build-isolation --no-deps --no-index",
        "-Ccmake.define.SUBQUAD_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real",
        "-m pytest -m cuda",
        "--kernel-name kns=subquad --report-api-errors no --error-exitcode 86 --tool memcheck",
        "--tool racecheck",
        "cuda/sass.py",
        "-m bench cuda --budget",
    ):
        assert words in result.stdout, words
    table = result.stdout.split("\nsection ")[1]
    assert table.count("dry run") == 5 and " passed " not in table
    assert {path.name for path in tmp_path.iterdir()} >= {"gpu.log", "summary.txt", "summary.json"}


def test_sections_can_be_chosen(tmp_path):
    result = command_line("--dry-run", "install", "bench", OUT=str(tmp_path))
    assert "== install" in result.stdout and "== bench" in result.stdout and "== tests" not in result.stdout
    assert "no section 'test'" in command_line("test", OUT=str(tmp_path)).stderr
    json.loads((tmp_path / "summary.json").read_text())


def test_without_a_device_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device_architecture", lambda run: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "bench"])
    assert gpu.main() == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_a_section_that_fails_does_not_stop_the_others(gpu, monkeypatch, capsys):
    def broken(run, args):
        raise ValueError("something unforeseen")

    monkeypatch.setattr(gpu, "device_architecture", lambda run: "90a-real")
    monkeypatch.setattr(gpu, "tests", broken)
    monkeypatch.setattr(gpu, "install", lambda run, args: ("passed", args.arch))
    monkeypatch.setattr(gpu, "bench", lambda run, args: ("passed", "3 targets met"))
    monkeypatch.setattr(sys, "argv", ["gpu", "tests", "bench"])
    assert gpu.main() == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "ValueError: something unforeseen" in shown and "3 targets met" in shown
    assert "install    passed" in shown  # nothing was installed, so it came first
    assert "something unforeseen" in (gpu.OUT / "summary.txt").read_text()


# Commands


def test_commands_are_stopped_with_their_children(gpu, run):
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; print(1); time.sleep(60)'])"
    start = time.monotonic()
    status, _ = run.command([sys.executable, "-c", script], limit=2)
    assert status == 124 and time.monotonic() - start < 20
    status, text = run.command([sys.executable, "-c", "print('é'); raise SystemExit(3)"], limit=30, NAME="value")
    assert (status, text) == (3, "é\n")
    log = (gpu.OUT / "gpu.log").read_text()
    assert "$ NAME=value" in log and "é" in log and "stopped after 2 s" in log


def test_no_command_starts_when_the_time_is_up(gpu):
    run = gpu.Run(limit=0, dry=False)
    assert run.command([sys.executable, "-c", "raise SystemExit(3)"], limit=30) == (124, "no time is left")
    assert gpu.bench(run, ARGS)[0] == "left out"


def test_architectures(gpu, run, tmp_path, monkeypatch):
    assert [gpu.architecture(8, 0), gpu.architecture(9, 0), gpu.architecture(12, 0)] == [
        "80-real",
        "90a-real",
        "120-real",
    ]
    tool(tmp_path / "bin", "nvidia-smi", "print('9.0')", monkeypatch)
    assert gpu.device_architecture(run) == "90a-real"


# Sections


def test_counts_are_those_of_pytest(gpu, tmp_path):
    source = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    (tmp_path / "test_some.py").write_text(source + "def test_d(nothing): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=r.xml", "test_some.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert gpu.counts(tmp_path / "r.xml") == {"passed": 1, "failed": 2, "skipped": 1}
    assert gpu.counts(tmp_path / "none.xml") == {}


@pytest.mark.parametrize(
    "xml, status, result, words",
    [
        ('tests="9" failures="0" errors="0" skipped="2"', 0, "passed", "7 passed, 0 failed, 2 skipped"),
        ('tests="9" failures="1" errors="1" skipped="0"', 1, "FAILED", "7 passed, 2 failed, 0 skipped"),
        ('tests="4" failures="0" errors="0" skipped="4"', 0, "FAILED", "no test ran on the device; 0 passed"),
        (None, 5, "FAILED", "no test ran on the device; no report"),
    ],
)
def test_the_section_of_tests(gpu, run, monkeypatch, xml, status, result, words):
    def command(command, limit):
        assert command[1:5] == ["-m", "pytest", "-m", "cuda"]
        if xml:
            (gpu.OUT / "tests.xml").write_text(f"<testsuites><testsuite {xml}/></testsuites>")
        return status, "text"

    monkeypatch.setattr(run, "command", command)
    found, detail = gpu.tests(run, ARGS)
    assert found == result and words in detail


def test_cases_for_the_sanitizer(gpu):
    many = [f"tests/test_lsh_hash.py::test_codes[cuda-{n} tokens]" for n in range(31)]
    few = ["tests/test_bucket_attention.py::test_sums[cuda]", "tests/test_bucket_attention.py::test_other[cuda]"]
    others = ["tests/test_lsh_hash.py::test_graph_capture[cuda]", "tests/test_lsh_hash.py::test_codes[cuda_emulated-1]"]
    cases = gpu.sanitizer_cases([*others, *many, *few, "", "35 tests collected in 1 s :: really"])
    assert cases == [*(many[n] for n in (0, 10, 20, 30)), *few]
    assert gpu.sanitizer_cases([]) == []


@pytest.mark.parametrize(
    "body, result, words",
    [
        ("print('========= Error: Device not supported'); sys.exit(1)", "left out", "Device not supported"),
        ("print('========= ERROR SUMMARY: 0 errors')", "passed", "1 tests; memcheck: clean; racecheck: clean"),
        (
            "if 'pytest' in sys.argv and 'racecheck' in sys.argv:\n"
            "  print('========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)'); sys.exit(86)",
            "FAILED",
            "memcheck: clean; racecheck: RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
        ),
        (
            "if 'pytest' in sys.argv and 'memcheck' in sys.argv: print('1 failed, 2 passed in 3s'); sys.exit(1)",
            "FAILED",
            "memcheck: 1 failed, 2 passed in 3s; racecheck: clean",
        ),
    ],
)
def test_the_section_of_sanitizers(gpu, run, tmp_path, monkeypatch, body, result, words):
    tool(tmp_path / "bin", "compute-sanitizer", body, monkeypatch)
    monkeypatch.setattr(gpu, "sanitizer_cases", lambda lines: ["tests/test_lsh_hash.py::test_a"])
    real = run.command
    monkeypatch.setattr(run, "command", lambda c, *a, **k: (0, "") if "--collect-only" in c else real(c, *a, **k))
    found, detail = gpu.sanitizer(run, ARGS)
    assert found == result and words in detail


def test_a_missing_sanitizer_is_left_out(gpu, run, monkeypatch):
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    assert gpu.sanitizer(run, ARGS) == ("left out", "compute-sanitizer is not installed")


def test_the_section_of_the_bench(gpu, run, monkeypatch):
    lines = [
        {"name": "copy GB/s", "value": 4300.0, "unit": "", "target": None, "met": None},
        {"name": "forward (16, 8) N=4096", "value": 2.5, "unit": "x", "target": 1.0, "met": True},
        {"name": "forward (16, 8) N=65536", "value": 12.0, "unit": "x", "target": 20.0, "met": False},
        {"name": "bucket_sort N=16384", "value": None, "unit": "", "target": None, "met": False, "why": "wrong"},
    ]

    def command(command, limit):
        (gpu.OUT / "bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 1, "text"

    monkeypatch.setattr(run, "command", command)
    result, detail = gpu.bench(run, Namespace(budget=30.0))
    assert (result, detail) == ("FAILED", "1 targets met, 2 missed, 1 without a figure")
    shown = "\n".join(gpu.table(run))
    assert "MISSED" in shown and "12x" in shown and "wrong" in shown and "copy" not in shown


def test_what_an_installation_lacks_is_told(gpu, run, monkeypatch):
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    result, detail = gpu.install(run, ARGS)
    assert result == "FAILED" and "nvcc" in detail


def test_reasons(gpu):
    log = "building\n  k.cu(3): error: identifier is undefined\nERROR: Failed building wheel for subquad\n"
    assert gpu.reason(log) == "k.cu(3): error: identifier is undefined"
    assert gpu.reason("Traceback\n  line\nImportError: no _ext\n") == "ImportError: no _ext"
    assert gpu.reason("torch.AcceleratorError: CUDA error\nmore\n") == "torch.AcceleratorError: CUDA error"
    assert gpu.reason("one\ntwo\n\n") == "two" and gpu.reason("") == "no output"
