"""The command line: what it prints, its JSON, its files, and one sentence instead of a traceback for every mistake.

Commands run as a user runs them, in a process of their own. Most run without torch, which costs seconds to import: a
package of that name that cannot be imported hides it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import subquad
from cli_process import answer, random_arrays, refusal, start
from subquad import cli
from subquad.cli import console

DEFAULT_NAMES = [
    "exact", "rfa-64", "rfa-256", "rfa-hyperbolic-128", "ra-1", "ra-4", "lara-16", "lara-49", "eva-64x64", "eva-128x16",
    "sea-64x64", "sea-128x128", "topk-64", "topk-256", "yoso-e8", "yoso-16x8", "yoso-32x8", "yoso-32x9", "yoso-64x9",
    "yoso-128x9",
]  # fmt: skip


@pytest.fixture(scope="session")
def hide(tmp_path_factory):
    """hide(names) -> a folder for PYTHONPATH in which importing any of the names fails."""

    def make(*names):
        folder = tmp_path_factory.mktemp("hidden")
        for name in names:
            (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")\n")
        return folder

    return make


@pytest.fixture(scope="session")
def no_torch(hide):
    return hide("torch")


@pytest.fixture
def command(no_torch, tmp_path):
    """command(*arguments) -> the finished process of `python -m subquad`, run in an empty folder."""

    def run(*arguments, hidden=no_torch, **variables):
        return start(arguments, tmp_path, hidden, variables)

    return run


# info and the folders


def test_info_text(command):
    text = answer(command("info"))
    for word in (subquad.__version__, subquad.cpu.isa(), "threads:", "CUDA:", "numpy", "novel"):
        assert word in text
    assert max(map(len, text.splitlines())) <= console.WIDTH


def test_info_json(command):
    found = json.loads(answer(command("info", "--json", SUBQUAD_NUM_THREADS="3", SUBQUAD_ISA="x86_64")
                              if "x86_64" in subquad.cpu.available() else command("info", "--json")))  # fmt: skip
    assert found["subquad"] == subquad.__version__
    assert Path(found["location"]) == Path(subquad.__file__).parent.absolute()
    assert found["isa"] in found["isa_available"] and set(found["isa_available"]) <= set(found["isa_compiled"])
    assert found["cpu"]
    cuda = found["cuda"]
    assert cuda["built"] == subquad.cuda.is_built() == bool(cuda["architectures"])
    assert bool(cuda["devices"]) == (not cuda["why_none"]), "either devices, or why there are none"
    assert found["versions"]["numpy"] == np.__version__ and "python" in found["versions"]
    assert found["sample"]["shape"] == [1, 4, 2048, 32] and "Apache-2.0" in found["sample"]["provenance"]
    if found["environment"]:
        assert found["isa"] == "x86_64"
        assert found["threads"] == {"count": 3, "source": "SUBQUAD_NUM_THREADS"}
        assert found["environment"] == {"SUBQUAD_ISA": "x86_64", "SUBQUAD_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    "variables, source",
    [({"OMP_NUM_THREADS": "5,2"}, "OMP_NUM_THREADS"), ({"OMP_NUM_THREADS": ""}, "CPUs this process may run on")],
)
def test_info_says_where_the_threads_come_from(command, variables, source):
    found = json.loads(answer(command("info", "--json", SUBQUAD_NUM_THREADS="", **variables)))["threads"]
    assert found["source"].startswith(source)
    assert found["count"] == (5 if source == "OMP_NUM_THREADS" else len(os.sched_getaffinity(0)))


def test_info_survives_a_broken_environment(command):
    text = answer(command("info", SUBQUAD_ISA="z80", SUBQUAD_NUM_THREADS="many"))
    words = " ".join(text.split())
    assert 'got "z80"' in words and 'got "many"' in words


@pytest.mark.parametrize(
    "built, devices, sentence",
    [
        (False, 0, "no device: a reason"),
        (True, 0, "no device: a reason (kernels for 80-real)"),
        (True, 1, "H200 (capability 9.0, 132 multiprocessors, 139 GiB); kernels for 80-real"),
        (True, 2, "H200 (capability 9.0, 132 multiprocessors, 139 GiB), H200 (capability 9.0, 132 multiprocessors, "
                  "139 GiB); kernels for 80-real"),
    ],
)  # fmt: skip
def test_info_about_cuda(monkeypatch, capsys, built, devices, sentence):
    """As it is told on machines with and without a device, by builds with and without kernels."""
    device = ("H200", (9, 0), 132, (139 << 30) + 5)
    for name, value in {
        "is_built": built, "architectures": "80-real" if built else "", "devices": [device] * devices,
        "why_none": "" if devices else "a reason",
    }.items():  # fmt: skip
        monkeypatch.setattr(subquad.cuda, name, lambda value=value: value)
    cli.main(["info"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"CUDA: {sentence} system:" in text
    cli.main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)["cuda"]
    shown = {"name": "H200", "capability": [9, 0], "multiprocessors": 132, "memory_bytes": (139 << 30) + 5}
    assert found["built"] is built and found["devices"] == [shown] * devices
    assert found["why_none"] == ("" if devices else "a reason")


def test_info_imports_no_framework(tmp_path):
    code = (
        "import sys; from subquad.cli import main; main(['info']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'jax', 'matplotlib', 'safetensors', 'cupy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0


def test_version(command):
    assert answer(command("--version")) == f"subquad {subquad.__version__}\n"


@pytest.mark.parametrize(
    "option, folder, file",
    [("--cmake-dir", "cmake", "subquad-config.cmake"), ("--include-dir", "include", "subquad/subquad.h")],
)
def test_folders_for_cpp_programs(command, option, folder, file):
    found = Path(answer(command(option)).rstrip("\n"))
    assert found == Path(subquad._ext.__file__).parent.absolute() / folder and (found / file).is_file()


def test_missing_folder_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(subquad._ext, "__file__", str(tmp_path / "_ext.so"))
    assert cli.main(["--include-dir"]) == 2
    assert capsys.readouterr().err.startswith("subquad: error: no subquad/subquad.h in ")


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["compare", "--help"], ["crossover", "--help"]])
def test_help_has_examples(capsys, arguments):
    assert cli.main(arguments) == 0
    assert "examples:\n  subquad " in capsys.readouterr().out


def test_no_command_shows_the_help(command):
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: subquad" in done.stderr


def test_a_reader_that_leaves(no_torch, tmp_path):
    code = "from subquad.cli import main; import sys; sys.stdin.read(); sys.exit(main(['info', '--json']))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    child.stdout.close()
    child.stdin.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(60) == 0


# compare


@pytest.fixture(scope="module")
def compared(no_torch, tmp_path_factory):
    """One comparison on the start of the sample, shared by the tests below: (document, rows by name)."""
    names = "exact,yoso-e6,yoso-4x6,yoso-32x6,yoso-256x6,ra-2,ra-32,rfa-64,rfa-trig-64,lara-9,eva-64x64,eva-256x64"
    names += ",topk-16,topk-256,sea-32x16,sea-256x256"
    arguments = ["compare", "--seq", "256", "--repeats", "3", "--rows", names, "--seed", "7", "--json"]
    document = json.loads(answer(start(arguments, tmp_path_factory.mktemp("compared"), no_torch, {})))
    assert [row["name"] for row in document["rows"]] == names.split(",")
    return document, {row["name"]: row for row in document["rows"]}


def test_compare_json_fields(compared):
    document, rows = compared
    assert document["command"] == "compare" and document["subquad"] == subquad.__version__
    assert (document["seed"], document["repeats"], document["exact"]) == (7, 3, "exact")
    shape = [1, 4, 256, 32]
    assert document["input"] == {"source": "built-in sample", "q": shape, "k": shape, "v": shape, "dtype": "float32"}
    assert document["machine"]["isa"] == subquad.cpu.isa() and document["machine"]["threads"]["subquad"] >= 1
    for row in rows.values():
        low, high = row["time_quartiles_ms"]
        assert 0 < low <= row["time_ms"] <= high
        assert row["speedup"] == pytest.approx(rows["exact"]["time_ms"] / row["time_ms"])
        assert row["memory_mib"] is None or 0 <= row["memory_mib"] < 64
        assert 0 <= row["error"] and -1 <= row["softmax_cosine"] <= 1 + 1e-12


def test_compare_errors(compared):
    _, rows = compared
    # Exact rows differ from float64 by the rounding of float32 sums; sampled ones by their number of samples.
    for name in ("exact", "yoso-e6"):
        assert rows[name]["error"] < 1e-5 and rows[name]["budget"] == ""
    assert rows["exact"]["softmax_error"] == rows["exact"]["error"]
    assert rows["exact"]["softmax_cosine"] == pytest.approx(1, abs=1e-6)
    errors = [rows[f"yoso-{hashes}x6"]["error"] for hashes in (4, 32, 256)]
    # An eighth of the variance a step: the error falls by sqrt(8) = 2.8, here seen within 30 %.
    assert errors[0] / errors[1] == pytest.approx(8**0.5, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(8**0.5, rel=0.3)
    assert all(rows[f"yoso-{hashes}x6"]["softmax_error"] is None for hashes in (4, 32, 256))
    assert rows["yoso-4x6"]["estimates"] == rows["yoso-e6"]["estimates"] == "YOSO-E, 6 bits"


def test_compare_errors_of_what_estimates_softmax(compared):
    _, rows = compared
    for name in ("ra-2", "ra-32", "rfa-64", "rfa-trig-64", "lara-9", "eva-64x64"):
        row = rows[name]
        assert row["estimates"] == "softmax attention" and row["softmax_error"] == row["error"] > 0.05 and row["budget"]
    # RA is unbiased: sixteen times the samples give a quarter of the error, here seen within 30 %.
    assert rows["ra-2"]["error"] / rows["ra-32"]["error"] == pytest.approx(4, rel=0.3)
    assert rows["eva-256x64"]["error"] < 1e-5  # one block of all 256 tokens


def test_compare_errors_and_memory_of_what_an_oracle_selects(compared):
    _, rows = compared
    for name, all_keys in (("topk-16", "topk-256"), ("sea-32x16", "sea-256x256")):
        row = rows[name]
        assert "oracle" in row["method"] and row["estimates"] == "softmax attention"
        assert row["softmax_error"] == row["error"] > 0.02 and rows[all_keys]["error"] < 1e-5
        # neither the 1 MiB of logits nor what was selected is part of the call
        assert row["memory_mib"] is None or row["memory_mib"] < 1


def test_compare_repeats_itself_but_for_times(compared, command):
    document, rows = compared

    def errors(seed):
        done = command("compare", "--seq", "256", "--repeats", "1", "--rows", "yoso-32x6", "--seed", seed, "--json")
        return [(row["error"], row["softmax_cosine"]) for row in json.loads(answer(done))["rows"]][1]

    assert errors(7) == (rows["yoso-32x6"]["error"], rows["yoso-32x6"]["softmax_cosine"])
    assert errors(8) != errors(7)


def test_compare_table(command):
    text = answer(command("compare", "--seq", "64", "--repeats", "1", "--rows", "yoso-e5,yoso-2x5", "--threads", "1"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= console.WIDTH
    assert "built-in sample, q, k, v [1, 4, 64, 32] float32, seed 0" in lines[0]
    assert "threads: subquad 1" in text and subquad.cpu.isa() in text and np.__version__ in text
    heads = next(i for i, line in enumerate(lines) if line.startswith("row "))
    for name, line in zip(["exact", "yoso-e5", "yoso-2x5"], lines[heads + 2 : heads + 5], strict=True):
        assert line.split()[0] == name
        time, speedup, memory, error, cosine = line.split()[-5:]
        assert float(time) > 0 and float(speedup.rstrip("x")) >= 0 and float(error) >= 0 and -1 <= float(cosine) <= 1
        assert memory == "-" or float(memory) >= 0
    filled = " ".join(text.split())
    for words in ("median of 1 call after", "own, not an approximation of softmax", "torch cannot be imported"):
        assert words in filled
    assert "oracle" not in filled


def test_what_an_oracle_leaves_out_is_said(command):
    small = ["--heads", "1", "--dim", "8", "--min", "32", "--max", "64"]
    for arguments in (["compare", "--seq", "64", "--repeats", "1"], ["crossover", *small]):
        text = answer(command(*arguments, "--rows", "topk-8,sea-8x8"))
        assert "oracle: what is attended to was selected by the exact attention" in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= console.WIDTH
        assert "top-k (oracle), 8 keys" in text and "SEA (oracle), 8 columns, 8 keys" in text
    assert "oracle" not in answer(command("crossover", *small, "--rows", "yoso-1x4"))


def test_compare_runs_the_table_without_torch(command):
    rows = json.loads(answer(command("compare", "--seq", "32", "--repeats", "1", "--json")))["rows"]
    assert [row["name"] for row in rows] == DEFAULT_NAMES


def test_compare_with_torch(command):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    arguments = ["--seq", "96", "--repeats", "1", "--rows", "yoso-2x5,exact", "--dtype", "bfloat16", "--json"]
    document = json.loads(answer(command("compare", *arguments, hidden=None)))
    assert document["exact"] == "sdpa" and document["machine"]["threads"]["torch"] >= 1
    assert document["input"]["dtype"] == "bfloat16"
    assert [row["name"] for row in document["rows"]] == ["sdpa", "yoso-2x5", "exact"]
    for row in document["rows"][::2]:
        assert row["error"] < 2e-2  # a few roundings to 8 bits


def test_compare_on_npz(command, tmp_path):
    np.savez(tmp_path / "qkv.npz", other=np.zeros(3), **random_arrays(seq_k=50))
    done = command(
        "compare", "--input", "qkv.npz", "--repeats", "1", "--rows",
        "yoso-4x4,yoso-e4,lara-5,eva-8x4,topk-50,sea-50x50", "--json"
    )  # fmt: skip
    document = json.loads(answer(done))
    assert document["input"] == {
        "source": "qkv.npz", "q": [2, 4, 40, 8], "k": [2, 2, 50, 8], "v": [2, 2, 50, 12], "dtype": "float32"
    }  # fmt: skip
    assert all(row["error"] < 1e-5 for row in document["rows"] if not row["budget"] or "50" in row["name"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compare_on_safetensors(command, tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    stored = {name: np.ascontiguousarray(x) for name, x in random_arrays(np.dtype(dtype)).items()}
    safetensors.save_file(stored, tmp_path / "qkv.safetensors")
    arguments = ["compare", "--input", "qkv.safetensors", "--repeats", "1", "--rows", "yoso-e4", "--json"]
    document = json.loads(answer(command(*arguments)))
    assert document["input"]["dtype"] == dtype
    short = json.loads(answer(command(*arguments, "--seq", "9", "--dtype", "float32")))
    assert (short["input"]["q"], short["input"]["dtype"]) == ([2, 4, 9, 8], "float32")


def test_compare_draws_a_picture(command, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    arguments = ["compare", "--seq", "48", "--repeats", "1", "--plot", "out.png"]
    answer(command(*arguments, "--rows", "yoso-e4,yoso-2x4,yoso-8x4,lara-4,ra-1,ra-2"))
    picture = (tmp_path / "out.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
    answer(command(*arguments, "--rows", "exact"))  # no budgets: lines only
    assert (tmp_path / "out.png").read_bytes() != picture


def test_progress_only_where_somebody_watches(no_torch, tmp_path):
    pty = pytest.importorskip("pty", reason="this system has no pseudo terminals")
    reader, writer = pty.openpty()
    path = os.pathsep.join(filter(None, [str(no_torch), os.environ.get("PYTHONPATH", "")]))
    arguments = ["compare", "--seq", "16", "--repeats", "1", "--rows", "yoso-2x4", "--json"]
    done = subprocess.run([sys.executable, "-m", "subquad", *arguments], cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=writer, env={**os.environ, "PYTHONPATH": path}, timeout=300)  # fmt: skip
    os.close(writer)
    said = os.read(reader, 1 << 16)
    os.close(reader)
    json.loads(done.stdout)
    assert b"time: round 1/1" in said and b"memory 2/2: yoso-2x4" in said and said.endswith(b"\x1b[K")


# crossover


def test_crossover_json(command):
    arguments = ["--heads", "1", "--dim", "8", "--min", "16", "--max", "96", "--rows",
                 "yoso-1x4,eva-8x8,ra-1,topk-8,sea-8x8"]  # fmt: skip
    document = json.loads(answer(command("crossover", *arguments, "--threads", "1", "--json")))
    assert (document["dim"], document["heads"], document["min"], document["max"]) == (8, 1, 16, 96)
    assert document["exact"] == {"name": "exact", "label": "softmax (subquad)"}
    assert document["machine"]["threads"] == {"subquad": 1}
    assert [row["name"] for row in document["rows"]] == ["yoso-1x4", "eva-8x8", "ra-1", "topk-8", "sea-8x8"]
    for row in document["rows"]:
        status = ("quadratic",) if row["name"] == "ra-1" else ("always", "crossed", "never")
        assert row["status"] in status and (row["n"] is None) == (row["status"] in ("never", "quadratic"))
        assert [p["n"] for p in row["points"]] == sorted({p["n"] for p in row["points"]})
        assert all(16 <= p["n"] <= 96 and min(p["exact_ms"], p["row_ms"], p["ratio"]) > 0 for p in row["points"])


def test_crossover_text(command):
    text = answer(command("crossover", "--heads", "1", "--dim", "8", "--max", "64", "--rows", "yoso-4096x8,ra-1"))
    assert "YOSO, 8 bits, 4096 hashes: not within --max 64" in text
    assert re.search(r"^ +N +exact ms +yoso-4096x8 ms +speed-up$", text, re.MULTILINE)
    assert re.search(r"^RA, 1 sample: time grows as N\^2 too, \d\.\d\dx as fast at N = 64$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= console.WIDTH


# mistakes


def test_mistakes_leave_as_one_sentence(command):
    assert refusal(command("compare", "--rows", "nothing")).startswith("unknown row 'nothing': expected ")
    sentence = refusal(command("compare", "--seq", "16", "--rows", "sdpa"))
    assert sentence == "row sdpa needs torch (No module named 'torch'): pip install subquad[torch]"
    sentence = refusal(command("crossover", "--rows", "exact"))
    assert sentence == "--rows: expected other rows than exact, which they are compared with"
    for variables in ({"SUBQUAD_ISA": "z80"}, {"SUBQUAD_NUM_THREADS": "many"}):
        sentence = refusal(command("compare", "--seq", "16", **variables))
        assert next(iter(variables)) in sentence and next(iter(variables.values())) in sentence


def test_missing_packages_are_named_before_any_work(command, hide, tmp_path):
    done = command("compare", "--plot", "out.png", hidden=hide("matplotlib", "torch"))
    assert refusal(done) == "--plot needs matplotlib (No module named 'matplotlib'): pip install subquad[plot]"
    (tmp_path / "qkv.safetensors").write_bytes(b"")
    done = command("compare", "--input", "qkv.safetensors", hidden=hide("safetensors", "torch"))
    assert refusal(done).endswith("(No module named 'safetensors'): pip install safetensors")
    done = command("compare", "--dtype", "bfloat16", hidden=hide("ml_dtypes", "torch"))
    assert refusal(done) == "bfloat16 needs ml_dtypes (No module named 'ml_dtypes'): pip install ml_dtypes"
