"""The rules of the house as code: who may include whom, one operator in one story, the top level, sizes of files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "cpp",
    "cuda",
    "python",
    "tests",
    "bench",
}
CODE = {".py", ".cpp", ".h", ".cuh", ".cu", ".cmake", ".txt", ".in", ".toml", ".md", ".pyi", ""}

pytestmark = pytest.mark.skipif(not (ROOT / "cpp" / "operators.cmake").exists(), reason="needs the source tree")


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).exists()]


def includes(path):
    return re.findall(r'^\s*#\s*include\s+([<"][^>"]+[>"])', path.read_text(), re.M)


def words(name):
    text = re.sub(r"#.*", "", (ROOT / "cpp" / "operators.cmake").read_text())
    return re.search(rf"set\({name}\s*([^)]*)\)", text).group(1).split()


def is_std(include):
    return include[0] == "<" and "/" not in include and not include.endswith(".h>")


# Who may include whom


def test_public_headers_include_the_standard_library_and_themselves():
    for path in (ROOT / "cpp/include/subquad").glob("*.h"):
        for include in includes(path):
            assert is_std(include) or include.startswith('"subquad/'), f"{path.name} includes {include}"
        text = path.read_text()
        assert not re.search(r"immintrin|arm_neon|cuda_runtime|Python\.h", text), path.name


def test_operators_and_methods_reach_backends_only_through_the_table():
    for folder in ("ops", "methods"):
        for path in (ROOT / "cpp/src" / folder).iterdir():
            for include in includes(path):
                allowed = is_std(include) or re.match(r'"(subquad|core|ops|methods)/', include)
                assert allowed, f"{path.name} includes {include}"


ROW_HEADERS = {"<cstdint>", "<cstddef>", "<cstring>", "<immintrin.h>", "<arm_neon.h>"}


def row_sources():
    for path in [*(ROOT / "cpp/src/cpu").glob("*.*"), *(ROOT / "cpp/src/cpu/amx").glob("*.*")]:
        if not path.name.startswith("detect"):
            yield path


def test_rows_include_no_code_of_the_standard_library():
    allowed = re.compile(
        r'"(cpu/.*|ops/\w+_args\.h|subquad/(dtype|queue|options)\.h|core/(visit|philox|parallel|operand|kernels)\.h)"'
    )
    for path in row_sources():
        for include in includes(path):
            assert include in ROW_HEADERS or allowed.match(include), f"{path.name} includes {include}"


def test_functions_in_headers_of_rows_are_static():
    """An inline function compiled for AVX-512 in one object can become the copy that the linker keeps for all."""
    headers = [path for path in row_sources() if path.suffix == ".h" and path.name != "table.h"]
    headers += [ROOT / "cpp/src/core" / f"{name}.h" for name in ("visit", "philox", "operand")]
    headers += [ROOT / "cpp/include/subquad/dtype.h"]
    for path in headers:
        for match in re.finditer(
            r"^(?!static|template|struct|typedef|using|namespace|enum|class|#|//|\}|\s)[\w:<>*& ]+\(",
            path.read_text(),
            re.M,
        ):
            raise AssertionError(f"{path.name}: not static: {match.group(0)}")
        assert not re.search(r"^\s*inline |^inline ", path.read_text(), re.M), f"{path.name} has an inline function"


def test_only_detect_reads_cpuid():
    for path in tracked():
        if path.suffix in {".cpp", ".h"} and path.name != "detect.cpp":
            assert "cpuid" not in path.read_text() and "__builtin_cpu_supports" not in path.read_text(), path.name


def test_the_core_knows_no_cuda_and_the_bindings_only_public_headers():
    for path in (ROOT / "cpp").rglob("*.*"):
        if path.suffix in {".h", ".cpp"}:
            assert not any(i.startswith('"cuda/') or "cuda_runtime" in i for i in includes(path)), path.name
    for path in (ROOT / "python/src").iterdir():
        for include in includes(path):
            allowed = is_std(include) or include.startswith(
                ("<nanobind/", '"subquad/', "<Python.h", "<dlfcn.h", "<sys/mman.h")
            )
            assert allowed or (path.parent / include.strip('"')).exists(), f"{path.name} includes {include}"


def cuda_sources():
    return [path for path in (ROOT / "cuda/src").rglob("*.*") if path.name != "register.cu"]


def test_cuda_kernels_include_the_core_and_no_framework():
    allowed = re.compile(
        r'"(device/\w+\.cuh|\w+\.cuh|table\.h|ops/\w+_args\.h|core/(kernels|operand|visit|philox)\.h'
        r'|subquad/(dtype|queue|options)\.h)"'
    )
    for path in cuda_sources():
        for include in includes(path):
            language = path.parent.name == "device" and re.match(r'<cuda_runtime\.h>|"emulator/', include)
            assert language or include in ROW_HEADERS or allowed.match(include), f"{path.name} includes {include}"


def test_cuda_kernels_start_in_one_place_and_write_no_assembler():
    for path in cuda_sources():
        if path.parent.name != "device":
            text = path.read_text()
            assert "<<<" not in text and "asm" not in text, path.name


def test_importing_subquad_loads_numpy_and_no_other_framework():
    others = ("torch", "jax", "cupy", "transformers", "matplotlib", "scipy")
    script = f"import sys, subquad; print([m for m in {others} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_references_use_numpy_only():
    for path in (ROOT / "tests/ref").glob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] in {"numpy", "ref", "__future__", "itertools", "math", "dataclasses"}, (
                f"{path.name} imports {name}"
            )


def test_nothing_imports_the_torch_part():
    for path in (ROOT / "python/subquad").rglob("*.py"):
        if "torch" not in path.relative_to(ROOT / "python/subquad").parts:
            assert "subquad.torch" not in set(imports_of(path)), path.name


# One operator, one story


def test_every_operator_has_every_part():
    for name in words("SUBQUAD_OPERATORS"):
        for part in (
            f"cpp/include/subquad/{name}.h",
            f"cpp/src/ops/{name}.cpp",
            f"cpp/src/ops/{name}_args.h",
            f"cpp/src/cpu/{name}.cpp",
            f"tests/test_{name}.py",
            f"tests/cpp/test_{name}.cpp",
            f"tests/ref/{'philox' if name == 'random' else name}.py",
        ):
            assert (ROOT / part).exists(), f"{name}: {part} is missing"
        for table, line in (
            ("cpp/src/core/kernels.h", f" {name};"),
            ("cpp/src/cpu/table.cpp", f"{name}_slot"),
            ("cpp/src/cpu/table.h", f"{name}_slot"),
            ("cpp/include/subquad/subquad.h", f"subquad/{name}.h"),
        ):
            assert line in (ROOT / table).read_text(), f"{name}: no line in {table}"


def test_every_cuda_slot_has_its_kernel():
    slots = re.findall(r"> (\w+)_slot;", (ROOT / "cuda/src/table.h").read_text())
    assert len(slots) >= 10
    for name in slots:
        assert f"k.{name} = {name}_slot;" in (ROOT / "cuda/src/table.cu").read_text(), name
        operator = name.removesuffix("_bwd")
        assert operator in words("SUBQUAD_OPERATORS"), name
        for part in (f"cuda/src/{operator}.cu", f"cuda/src/{operator}.cuh"):
            assert (ROOT / part).exists(), f"{name}: {part} is missing"


def test_every_method_has_every_part():
    for name in words("SUBQUAD_METHODS"):
        for part in (
            f"cpp/include/subquad/{name}.h",
            f"cpp/src/methods/{name}.cpp",
            f"tests/test_{name}.py",
            f"tests/ref/{name}.py",
        ):
            assert (ROOT / part).exists(), f"{name}: {part} is missing"


def test_every_public_function_has_a_twin_in_cpp():
    """But for those that draw."""
    import subquad

    headers = "".join(path.read_text() for path in (ROOT / "cpp/include/subquad").glob("*.h"))
    for name in subquad.__all__:
        value = getattr(subquad, name)
        if callable(value) and not isinstance(value, type) and value.__module__ != "subquad.heatmap":
            assert re.search(rf"\bvoid {name}\(", headers), f"{name} has no C++ twin"


# The tree


def test_top_level():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_files_stay_short():
    for path in tracked():
        if path.suffix in {".py", ".cpp", ".h", ".cuh", ".cu", ".cmake"}:
            lines = path.read_text().count("\n")
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_machine_paths_or_promises():
    bad = re.compile(r"(?:^|[^\w.])/(?:work|root|home/\w+|tmp)/|\bTODO\b|\bFIXME\b|\bXXX\b")
    for path in tracked():
        if path.suffix in CODE and path.name not in {"LICENSE", "test_house.py", "text.txt"}:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                assert not bad.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"


def test_the_committed_stub_is_the_generated_one(tmp_path):
    nanobind = pytest.importorskip("nanobind", reason="nanobind, which writes the stub, is not installed")
    if not nanobind.__version__.startswith("3."):
        pytest.skip("the stub is written by nanobind 3, whose format it has")
    made = tmp_path / "_ext.pyi"
    subprocess.run([sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "subquad._ext", "-o", made], check=True)
    committed = ROOT / "python/subquad/_ext.pyi"
    hint = "write it again with: python -m nanobind.stubgen -m subquad._ext -o python/subquad/_ext.pyi"
    assert committed.exists() and made.read_text() == committed.read_text(), hint
