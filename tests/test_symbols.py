"""No row of kernels leaks an inline function: tests/cpp/row_symbols.cmake on the library and on seeded leaks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import subquad

SCRIPT = Path(__file__).parent / "cpp" / "row_symbols.cmake"


def tool(*names):
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"{' or '.join(names)} is not installed")


def check(archive, rows):
    command = [tool("cmake"), f"-DNM={tool('nm', 'llvm-nm')}", f"-DARCHIVE={archive}", f"-DROWS={';'.join(rows)}"]
    return subprocess.run([*command, "-P", str(SCRIPT)], capture_output=True, text=True)


def make_archive(folder, **sources):
    """An archive whose members are all called op.cpp.o, as those of the rows are."""
    compiler, archive = tool("c++", "g++", "clang++"), folder / "libseeded.a"
    members = []
    for name, text in sources.items():
        (folder / name).mkdir()
        source, member = folder / name / "op.cpp", folder / name / "op.cpp.o"
        source.write_text(text)
        subprocess.run([compiler, "-std=c++17", "-O0", "-c", str(source), "-o", str(member)], check=True)
        members.append(str(member))
    subprocess.run([tool("ar", "llvm-ar"), "qc", str(archive), *members], check=True)
    return archive


def row(name, body, helpers=""):
    return f"{helpers} namespace subquad::cpu::{name} {{ {body} }}"


CLEAN = "static int f(int x) { return x; } template <class T> T g(T x) { return x; } int run() { return f(1) + g(2); }"


def test_installed_library():
    found = subprocess.run([sys.executable, "-m", "subquad", "--cmake-dir"], capture_output=True, text=True, check=True)
    archive = Path(found.stdout.strip()).parent / "lib" / "libsubquad.a"
    done = check(archive, subquad.cpu.compiled())
    assert done.returncode == 0, done.stderr


def test_clean_rows_pass(tmp_path):
    operator = "namespace subquad { inline int f() { return 1; } int op() { return f(); } }"
    archive = make_archive(tmp_path, op=operator, x86_64=row("x86_64", CLEAN), neon=row("neon", CLEAN))
    done = check(archive, ["x86_64", "neon"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "helpers, symbol",
    [
        ("inline int leak() { return 1; }", "_Z4leakv"),
        ("namespace std { template <class T> T shared(T x) { return x; } } "
         "static int leak() { return std::shared(1); }",
         "_ZSt6shared"),
        ("namespace subquad { struct S { int f() { return 1; } }; } static int leak() { return subquad::S().f(); }",
         "_ZN7subquad1S1f"),
        ("namespace subquad::cpu::x86_64 { inline int f() { return 1; } } "
         "static int leak() { return subquad::cpu::x86_64::f(); }",
         "_ZN7subquad3cpu6x86_641f"),
    ],
)  # fmt: skip
def test_leak_is_caught(tmp_path, helpers, symbol):
    leaky = row("x86_64_v4", f"{CLEAN} int use() {{ return leak(); }}", helpers)
    done = check(make_archive(tmp_path, x86_64=row("x86_64", CLEAN), x86_64_v4=leaky), ["x86_64", "x86_64_v4"])
    assert done.returncode != 0
    assert "x86_64_v4" in done.stderr and symbol in done.stderr


def test_absent_row_is_an_error(tmp_path):
    done = check(make_archive(tmp_path, x86_64=row("x86_64", CLEAN)), ["x86_64", "x86_64_v3"])
    assert done.returncode != 0
    assert "x86_64_v3" in done.stderr
