"""A C++ program finds the library with find_package, in the wheel and in a plain installation."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import subquad

REPOSITORY = Path(__file__).parent.parent
CONSUMER = Path(__file__).parent / "cpp" / "consumer"

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tools():
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_consumer(build, *settings):
    run("cmake", "-S", CONSUMER, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *settings)
    run("cmake", "--build", build)
    printed = run(build / "consumer")
    checksum = float(re.search(r"checksum ([0-9.]+)", printed)[1])
    assert 590 < checksum < 600.01, printed  # 600 rows of length 1, a few of them zero
    if (build / "consumer_cuda").exists():
        done = subprocess.run([str(build / "consumer_cuda")], capture_output=True, text=True, timeout=300)
        assert done.returncode == (0 if subquad.cuda.is_available() else 77), done.stdout + done.stderr


def test_wheel(tmp_path):
    config = run(sys.executable, "-m", "subquad", "--cmake-dir").strip()
    check_consumer(tmp_path / "consumer", f"-Dsubquad_DIR={config}")


def test_plain_install(tmp_path):
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    # One row of kernels: what is tested is the way to them.
    row = "x86_64" if platform.machine() in ("x86_64", "AMD64") else "neon"
    settings = (f"-DSUBQUAD_ONLY_ROWS={row}", "-DSUBQUAD_PYTHON=OFF", "-DSUBQUAD_CUDA=OFF")
    settings += (f"-DCMAKE_INSTALL_PREFIX={prefix}",)
    run("cmake", "-S", REPOSITORY, "-B", build, *settings)
    run("cmake", "--build", build, "-j", os.cpu_count() or 1)
    run("cmake", "--install", build)
    check_consumer(tmp_path / "consumer", f"-DCMAKE_PREFIX_PATH={prefix}")
    public = sorted(path.name for path in (REPOSITORY / "cpp" / "include" / "subquad").iterdir())
    assert sorted(path.name for path in (prefix / "include" / "subquad").iterdir()) == public
