"""The example of distillation: that it runs as a user runs it, repeats, learns, and refuses in one sentence."""

import json
import os
import re
import subprocess
import sys

import pytest

from subquad.examples.distill_sea import main


def document(capsys, *arguments):
    pytest.importorskip("torch", reason="torch is not installed")
    assert main([*map(str, arguments), "--json"]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def start(*arguments, hidden=""):
    path = os.pathsep.join(filter(None, [str(hidden), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "subquad.examples.distill_sea", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip


def test_table():
    pytest.importorskip("torch", reason="torch is not installed")
    done = start("--quick", "--threads", 1)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if re.match("dense|SEA|RFA", line)}
    assert {name: row[1] for name, row in rows.items()} == {"dense": "12", "SEA": "4", "RFA": "4"}
    assert all(1 < float(x) < 400 for row in rows.values() for x in row[3:])
    assert "11352 bytes" in done.stdout and "What it does not" in done.stdout
    assert all(f"{name}: step " in done.stderr for name in ("dense", "SEA", "RFA"))


def test_a_seed_repeats_a_run(capsys):
    runs = [document(capsys, "--quick", "--seed", seed)[0]["models"] for seed in (3, 3, 4)]
    first, again, other = ([(row["before"], row["perplexity"]) for row in rows] for rows in runs)
    assert first == again != other


def test_students_begin_with_the_weights_of_the_teacher_and_learn(capsys, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 48)) * 200)
    sizes = ("--steps", 40, "--student-steps", 25, "--width", 24, "--layers", 2, "--batch", 8)
    result, _ = document(capsys, "--quick", *sizes, "--text", text)
    assert result["text"] == {"name": str(text), "bytes": 3200, "held_out": 320}
    assert result["options"]["layers"] == 2 and result["options"]["context"] == 32
    dense, sea, rfa = result["models"]
    assert dense["perplexity"] < 0.1 * dense["before"]
    for student in (sea, rfa):
        assert student["before"] < 0.5 * dense["before"]
        assert student["perplexity"] < student["before"]


def test_no_steps_leave_the_models_alone(capsys):
    result, errors = document(capsys, "--quick", "--steps", 0, "--student-steps", 0)
    assert all(row["before"] == row["perplexity"] for row in result["models"]) and errors == ""


def test_refusals(capsys, tmp_path):
    (tmp_path / "short").write_bytes(b"x" * 100)
    for arguments, sentence in (
        (("--text", tmp_path / "missing"), f"--text: {tmp_path}/missing cannot be read: No such file or directory"),
        (
            ("--quick", "--text", tmp_path / "short"),
            "--text: expected at least 320 bytes, ten windows of --context 32, got 100",
        ),
        (("--width", 30), "--width: expected a multiple of --heads 4, got 30"),
        (("--columns", 10), "--columns: expected a multiple of 4, got 10"),
    ):
        assert main([str(x) for x in arguments]) == 2
        assert capsys.readouterr() == ("", f"distill_sea: error: {sentence}\n")
    with pytest.raises(SystemExit, match="2"):
        main(["--layers", "0"])
    assert "argument --layers: expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    done = start(hidden=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    sentence = "this example needs torch, which cannot be imported: No module named 'torch'"
    assert done.stderr == f"distill_sea: error: {sentence}\n"
