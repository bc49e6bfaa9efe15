"""The check of compiled kernels: what it reads from the tools, what it refuses, and that the kernels pass it."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cuda" / "sass.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")

SOURCE = """
#include <cstdint>
namespace subquad::cuda {
struct Args { float* out; const float* in; int count; };

template <int Count>
__global__ void __launch_bounds__(128, 4) plain_kernel(Args args) {
  __shared__ float tile[256];
  tile[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < Count; ++i) sum = fmaf(tile[(threadIdx.x + i) % 128], sum, 1.0f);
  args.out[threadIdx.x] = sum + __expf(sum);
}
template __global__ void plain_kernel<3>(Args);

__global__ void __launch_bounds__(64) framed_kernel(Args args) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = args.in[i * args.count];
  for (int i = 0; i < 64; ++i) args.out[i] = local[int(args.in[i]) & 63];
}

__device__ void product(Args args) {
  uint32_t a = args.count, b = args.count + 1;
  float d[4] = {};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, "
               "{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "r"(b));
  args.out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
__global__ void __launch_bounds__(32) planes_kernel(Args args) { product(args); }
__global__ void __launch_bounds__(32) collision_kernel(Args args) { args.out[threadIdx.x] = args.in[0]; }
}
"""


@pytest.fixture(scope="module")
def sass():
    spec = importlib.util.spec_from_file_location("sass", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def need_nvcc(sass):
    if not sass.find_tool("nvcc"):
        pytest.skip("nvcc is not installed")


def need_disassembler(sass):
    if not sass.find_tool("nvdisasm"):
        pytest.skip("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)")


@pytest.fixture(scope="module")
def sample(sass, tmp_path_factory):
    """A small source compiled for two architectures: the kernels by (arch, short name)."""
    need_nvcc(sass)
    folder = tmp_path_factory.mktemp("sass")
    source = folder / "sample.cu"
    source.write_text(SOURCE)
    kernels = sass.compiled(source, ["sm_80", "sm_90a"], folder / "build", [])
    return {(k.arch, k.short): k for k in kernels}


# What is read


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_resources_and_launch_bounds_are_read(sample, sass, arch):
    plain = sample[arch, "plain_kernel<3>"]
    assert (plain.threads, plain.blocks, plain.stack, plain.spills, plain.shared) == (128, 4, 0, 0, 1024)
    assert 4 <= plain.registers <= 128
    framed = sample[arch, "framed_kernel"]
    assert framed.stack == 256 and framed.blocks is None
    assert len(sample) == 8


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_instructions_are_counted(sample, sass, arch):
    need_disassembler(sass)
    plain = sample[arch, "plain_kernel<3>"].counts
    assert plain["LDG"] == 1 and plain["STS"] == 1 and plain["BAR"] == 1 and plain["LDS"] >= 3
    assert plain["FFMA"] >= 2 and plain["MUFU"] == 1 and plain["HMMA"] == 0
    assert sample[arch, "planes_kernel"].counts["HMMA"] == 1
    framed = sample[arch, "framed_kernel"].counts
    assert framed["STL"] + framed["LDL"] > 64 / 4


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_faults_of_compiled_kernels_are_found(sample, sass, arch):
    assert not [*sass.faults(sample[arch, "plain_kernel<3>"])]
    assert not [*sass.faults(sample[arch, "planes_kernel"])]
    assert any("stack frame of 256" in fault for fault in sass.faults(sample[arch, "framed_kernel"]))
    need_disassembler(sass)
    assert any("tensor cores" in fault for fault in sass.faults(sample[arch, "collision_kernel"]))


def test_objects_give_what_compilation_gave(sample, sass, tmp_path):
    need_disassembler(sass)
    if not sass.find_tool("cuobjdump"):
        pytest.skip("cuobjdump is not installed (pip install nvidia-cuda-cuobjdump)")
    source = tmp_path / "sample.cu"
    source.write_text(SOURCE)
    sass.compiled(source, ["sm_90a"], tmp_path, [])
    found = sass.disassembled(tmp_path / "sample" / "made.o")
    assert len(found) == 4
    for kernel in found:
        here = sample["sm_90a", kernel.short]
        assert (kernel.registers, kernel.stack, kernel.shared) == (here.registers, here.stack, here.shared)
        assert kernel.counts == here.counts


def test_sources_are_compiled_again_when_they_change(sass, tmp_path, monkeypatch):
    need_nvcc(sass)
    source = tmp_path / "one.cu"
    source.write_text('#include "part.h"\n__global__ void one_kernel(float* x) { *x = kPart; }')
    (tmp_path / "part.h").write_text("constexpr float kPart = 1;")
    sass.compiled(source, ["sm_80"], tmp_path / "build", [tmp_path])
    made = tmp_path / "build" / "one" / "made.o"
    first = made.stat().st_mtime_ns
    sass.compiled(source, ["sm_80"], tmp_path / "build", [tmp_path])
    assert made.stat().st_mtime_ns == first
    (tmp_path / "part.h").write_text("constexpr float kPart = 2;")
    sass.compiled(source, ["sm_80"], tmp_path / "build", [tmp_path])
    assert made.stat().st_mtime_ns != first


def test_errors_of_the_compiler_are_shown(sass, tmp_path, capsys):
    need_nvcc(sass)
    source = tmp_path / "bad.cu"
    source.write_text("__global__ void k() { nonsense; }")
    with pytest.raises(RuntimeError, match='"nonsense" is undefined'):
        sass.compiled(source, ["sm_80"], tmp_path / "build", [])


# Verdicts


def test_names_lose_their_parameters_and_our_namespaces(sass):
    name = "void subquad::cuda::gather_kernel<8, subquad::bfloat16, (int)3>(subquad::Args)"
    assert sass.short(name) == "gather_kernel<8, bfloat16, 3>"
    assert sass.short("subquad::cuda::(anonymous namespace)::plain_kernel(float*)") == "plain_kernel"
    assert sass.identifiers("_ZN7subquad4cuda12plain_kernelENS0_4ArgsE") == "plain_kernel"
    assert sass.identifiers("_ZN7subquad4cuda12plain_kernelILi3EEEvNS0_4ArgsE").startswith("plain_kernel<ILi3E")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"stack": 16}, "a stack frame of 16 bytes"),
        ({"registers": 256}, "256 registers"),
        ({"counts": Counter(HMMA=8, STL=2, LDL=1)}, "1 LDL and 2 STL"),
        ({"counts": Counter(FFMA=8)}, "no HMMA"),
        ({"registers": 168}, "3 blocks per multiprocessor fit, its launch bounds promise 4"),
        ({"shared": 100 * 1024}, "2 blocks per multiprocessor fit, its launch bounds promise 4"),
    ],
)
def test_verdicts(sass, change, words):
    good = dict(registers=100, shared=0, stack=0, spills=0, threads=128, blocks=4, counts=Counter(HMMA=8, FADD=2))
    name = "void subquad::cuda::planes_kernel<64>(subquad::Args)"
    assert not [*sass.faults(sass.Kernel(name, "sm_90a", **good))]
    found = [*sass.faults(sass.Kernel(name, "sm_90a", **(good | change)))]
    assert len(found) == 1 + (words.startswith("256")) and any(words in fault for fault in found), found
    lines = [*sass.table([sass.Kernel(name, "sm_90a", **(good | change))])]
    assert any("FAILED" in line and words in line for line in lines)


def test_matrix_products_of_warpgroups_count(sass):
    kernel = sass.Kernel("planes_kernel", "sm_90a", counts=Counter(HGMMA=4, LDSM=3, LDS=1))
    assert kernel.count("HMMA") == 4 and kernel.count("LDS") == 4 and not [*sass.faults(kernel)]


def test_without_nvcc_it_says_so(sass, monkeypatch, capsys):
    monkeypatch.setattr(sass, "find_tool", lambda name: None)
    assert sass.main(["--build", "unused"]) == 2
    assert "nvcc was not found" in capsys.readouterr().err
