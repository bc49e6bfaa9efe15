"""The README says what is true: its matrix is found again by trying, its examples run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the source tree")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S)


def test_support_matrix():
    for name in ("torch", "jax", "ml_dtypes"):
        pytest.importorskip(name, reason=f"{name}, which has a column in the matrix, is not installed")
    import support_matrix

    assert support_matrix.table() == support_matrix.committed(), "run: python tests/support_matrix.py --write"


def test_python_examples():
    examples = blocks("python")
    assert len(examples) >= 2
    for code in examples:
        if "torch" in code:
            pytest.importorskip("torch", reason="torch is not installed")
        exec(compile(code, str(README), "exec"), {})


def test_cpp_example(tmp_path):
    compiler = shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    import subquad

    package = Path(subquad._ext.__file__).parent
    library = package / "lib" / "libsubquad.a"
    (code,) = blocks("cpp")
    source = tmp_path / "example.cpp"
    source.write_text(code)
    program = tmp_path / "example"
    command = [compiler, "-std=c++17", f"-I{package / 'include'}", source, library, "-pthread", "-ldl", "-o", program]
    subprocess.run(command, check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.strip()
