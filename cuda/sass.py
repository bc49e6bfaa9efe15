"""What nvcc made of the CUDA kernels, without a GPU: registers, spills and instructions of each, and whether they are
as they should be. With objects or cubins as arguments it reads those; else it compiles the kernel sources."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_KERNELS = {"register.cu", "table.cu"}
# Kernels that multiply matrices: without HMMA (or HGMMA) the tensor cores are idle.
MATRIX_KERNELS = ("collision_kernel", "planes_kernel")
MAX_REGISTERS = 255
COLUMNS = ("HMMA", "FFMA", "MUFU", "LDS", "STS", "LDG", "BAR")
# What else counts for a column: the forms for matrices, for warpgroups, and asynchronous copies.
ALIASES = {"HGMMA": "HMMA", "LDSM": "LDS", "STSM": "STS", "LDGSTS": "LDG"}


class NoTool(RuntimeError):
    pass


@dataclass
class Kernel:
    """One kernel for one architecture. None: not known from what was read."""

    name: str
    arch: str
    registers: int | None = None
    shared: int | None = None
    stack: int | None = None
    spills: int | None = None
    threads: int | None = None  # of a block, from the launch bounds
    blocks: int | None = None  # per multiprocessor, which the launch bounds promise
    counts: Counter = field(default_factory=Counter)

    @property
    def short(self) -> str:
        return short(self.name)

    def count(self, column: str) -> int:
        return self.counts[column] + sum(self.counts[op] for op, name in ALIASES.items() if name == column)


# Tools


def find_tool(name: str) -> str | None:
    """On PATH, in a CUDA toolkit, or in an installed nvidia-* package."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(f"{f}/bin" for f in folders if f))
    spec = None if found else importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = found or next((str(path) for path in sorted(Path(folder).glob(f"*/bin/{name}"))), None)
    return found


def need(name: str, package: str) -> str:
    found = find_tool(name)
    if not found:
        raise NoTool(f"{name} was not found; put it on PATH, set CUDA_HOME, or pip install {package}")
    return found


def output(command: list[str]) -> str:
    """What a command prints. cuobjdump starts nvdisasm, so both must be found."""
    tools = {str(Path(found).parent) for found in map(find_tool, ("cuobjdump", "nvdisasm")) if found}
    environment = os.environ | {"PATH": os.pathsep.join([*tools, os.environ.get("PATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")
    return result.stdout


# Names


def demangle(names: list[str]) -> dict[str, str]:
    tool = find_tool("cu++filt") or shutil.which("c++filt")
    if not tool or not names:
        return {name: identifiers(name) for name in names}
    result = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, result.stdout.splitlines(), strict=True))


def identifiers(mangled: str) -> str:
    """The last part of a nested name and what is behind it, for want of a demangler."""
    rest, last = mangled.removeprefix("_ZN"), mangled
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match.group())
        last, rest = rest[match.end() : end], rest[end:]
    return f"{last}<{rest}>" if rest.startswith("I") else last


def short(name: str) -> str:
    """Without the result, the parameters and our own namespaces."""
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter in "<") - (letter in ">")
        if letter == "(" and depth == 0 and not name[i:].startswith("(anonymous"):
            name = name[:i]
            break
    name = re.sub(r"^void |subquad::|cuda::|\(anonymous namespace\)::|\((int|bool)\)", "", name)
    return name.replace("__nv_bfloat16", "bfloat16").replace("> >", ">>")


# What the tools print


def read_ptxas(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """-Xptxas -v: resources by (arch, mangled name)."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    key, entry = None, None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            entry = key = (match[2], match[1])
            found[key] = {"shared": 0}
        elif match := re.search(r"Function properties for (\S+)", line):
            # Functions that are called, and not inlined, have lines of their own.
            key = entry if entry and match[1] == entry[1] else None
        elif (
            match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line)
        ) and key:
            found[key] |= {"stack": int(match[1]), "spills": int(match[2]) + int(match[3])}
        elif (match := re.search(r"Used (\d+) registers", line)) and entry:
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return found


def read_usage(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """cuobjdump -res-usage: the same, but for spills."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch, name = "", ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            # Since sm_90 the kilobyte of every block that the system keeps is counted, where there is any other.
            kept = 1024 if int(re.sub(r"\D", "", arch)) >= 90 else 0
            shared = max(0, int(match[3]) - kept)
            found[arch, name] = {"registers": int(match[1]), "stack": int(match[2]), "shared": shared}
    return found


def read_bounds(ptx: str) -> dict[str, dict[str, int]]:
    """Launch bounds by mangled name: threads of a block, and blocks per multiprocessor where that is promised."""
    found: dict[str, dict[str, int]] = {}
    for match in re.finditer(r"^(?:\.visible )?\.entry (\w+)\((.*?)^\{", ptx, re.M | re.S):
        bounds = {}
        if threads := re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", match[2]):
            bounds["threads"] = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        if blocks := re.search(r"\.minnctapersm (\d+)", match[2]):
            bounds["blocks"] = int(blocks[1])
        found[match[1]] = bounds
    return found


def read_sass(text: str) -> dict[tuple[str, str], Counter]:
    """Opcodes by (arch, mangled name), of cuobjdump -sass and of nvdisasm."""
    found: dict[tuple[str, str], Counter] = {}
    arch, counts = "", None
    for line in text.splitlines():
        if match := re.match(r"\s*\.target\s+(\w+)", line):
            arch, counts = match[1], None
        elif match := re.match(r"\s*Function : (\S+)|\.text\.(\S+):$", line):
            counts = found.setdefault((arch, match[1] or match[2]), Counter())
        elif re.match(r"\s*\.section|\s*code for ", line):
            counts = None
        elif counts is not None and (
            match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line)
        ):
            counts[match[1]] += 1
    return found


def kernels_of(resources: dict, bounds: dict, opcodes: dict) -> list[Kernel]:
    names = demangle(sorted({name for _, name in resources}))
    return [
        Kernel(names[name], arch, **found, **bounds.get((arch, name), {}), counts=opcodes.get((arch, name), Counter()))
        for (arch, name), found in resources.items()
    ]


# Sources and objects


def compile_command(source: Path, archs: list[str], folder: Path, includes: list[Path]) -> list[str]:
    command = [need("nvcc", "nvidia-cuda-nvcc"), "-std=c++17", "-O3", "-Xptxas", "-v", "--keep", "--keep-dir"]
    command += [str(folder), "-MD", "-MF", str(folder / "made.d"), "-c", str(source), "-o", str(folder / "made.o")]
    for arch in archs:
        command += ["-gencode", f"arch={arch.replace('sm_', 'compute_')},code={arch}"]
    return command + [f"-I{path}" for path in includes]


def is_current(folder: Path, command: list[str]) -> bool:
    """Whether the last compilation had this command and nothing that it read is younger."""
    try:
        if (folder / "command").read_text() != json.dumps(command):
            return False
        made = (folder / "command").stat().st_mtime
        read = (folder / "made.d").read_text().split(":", 1)[1].replace("\\\n", " ").split()
        return all(Path(path).stat().st_mtime <= made for path in read)
    except (OSError, IndexError):
        return False


def compiled(source: Path, archs: list[str], build: Path, includes: list[Path]) -> list[Kernel]:
    """The kernels of one source, compiled once for all architectures if it changed."""
    folder = build / source.stem
    command = compile_command(source, archs, folder, includes)
    if not is_current(folder, command):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.time()
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{result.stderr[-4000:]}")
        (folder / "ptxas").write_text(result.stderr)
        for path in [*folder.glob("*.ii"), *folder.glob("*.c"), *folder.glob("*.cpp"), *folder.glob("*.gpu")]:
            path.unlink()
        (folder / "command").write_text(json.dumps(command))
        os.utime(folder / "command", (started, started))
    resources = read_ptxas((folder / "ptxas").read_text())
    bounds, opcodes = {}, {}
    for arch in archs:
        ptx, cubin = (folder / f"{source.stem}.compute_{arch[3:]}.{ending}" for ending in ("ptx", "cubin"))
        # With one architecture the names have none.
        ptx, cubin = (p if p.exists() else folder / f"{source.stem}{p.suffix}" for p in (ptx, cubin))
        cubin = cubin if cubin.exists() else next(folder.glob(f"*{arch}.cubin"), cubin)
        if ptx.exists():
            bounds |= {(arch, name): found for name, found in read_bounds(ptx.read_text()).items()}
        if find_tool("nvdisasm"):
            found = read_sass(output([need("nvdisasm", "nvidia-cuda-nvdisasm"), "-c", str(cubin)]))
            opcodes |= {(arch, name): counts for (_, name), counts in found.items()}
    return kernels_of(resources, bounds, opcodes)


def disassembled(path: Path) -> list[Kernel]:
    """The kernels in an object, a library or a cubin."""
    tool = need("cuobjdump", "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    try:
        usage = output([tool, "-res-usage", str(path)])
    except RuntimeError as error:
        if "does not contain device code" in str(error):
            return []
        raise
    return kernels_of(read_usage(usage), {}, read_sass(output([tool, "-sass", str(path)])))


# Verdicts


def blocks_per_sm(kernel: Kernel) -> int:
    """As many as the registers, the threads and the static shared memory of the block allow."""
    warps = -(-(kernel.threads or 1) // 32)
    registers = warps * -(-32 * max(1, kernel.registers or 1) // 256) * 256
    threads, shared = 2048, (228 if kernel.arch.startswith(("sm_90", "sm_100")) else 164) * 1024
    return min(32, 65536 // registers, threads // (32 * warps), shared // ((kernel.shared or 0) + 1024))


def faults(kernel: Kernel) -> Iterator[str]:
    if kernel.stack:
        yield f"a stack frame of {kernel.stack} bytes"
    if kernel.spills:
        yield f"spills {kernel.spills} bytes"
    elif kernel.counts["LDL"] + kernel.counts["STL"]:
        yield f"{kernel.counts['LDL']} LDL and {kernel.counts['STL']} STL: local memory"
    if (kernel.registers or 0) > MAX_REGISTERS:
        yield f"{kernel.registers} registers"
    if kernel.counts and kernel.short.split("<")[0] in MATRIX_KERNELS and not kernel.count("HMMA"):
        yield "no HMMA: the tensor cores are idle"
    if kernel.blocks and kernel.threads and blocks_per_sm(kernel) < kernel.blocks:
        yield f"{blocks_per_sm(kernel)} blocks per multiprocessor fit, its launch bounds promise {kernel.blocks}"


def table(kernels: list[Kernel]) -> Iterator[str]:
    width = max([len(k.short) for k in kernels] + [6])
    heads = ("reg", "shared", "stack", "spills", *COLUMNS, "total")
    yield f"{'kernel':{width}} {'arch':7}" + "".join(f"{head:>7}" for head in heads)
    for k in kernels:
        spills = k.counts["LDL"] + k.counts["STL"] if k.spills is None else k.spills
        known = [k.registers, k.shared, k.stack, spills]
        known += [k.count(c) if k.counts else None for c in COLUMNS] + [k.counts.total() if k.counts else None]
        yield f"{k.short:{width}} {k.arch:7}" + "".join(f"{'-' if n is None else n:>7}" for n in known)
        yield from (f"    FAILED: {fault}" for fault in faults(k))


def collect(args: argparse.Namespace) -> list[Kernel]:
    jobs = args.jobs or os.cpu_count() or 1
    with ThreadPoolExecutor(jobs) as pool:
        if args.objects:
            found = pool.map(disassembled, args.objects)
        else:
            sources = [path for path in (ROOT / "cuda/src").glob("*.cu") if path.name not in NO_KERNELS]
            sources = [path for path in sources if re.search(args.match, path.stem)]
            sources.sort(key=lambda path: (-path.stat().st_size, path.name))
            includes = [ROOT / "cpp/src", ROOT / "cpp/include", ROOT / "cuda/src"]
            found = pool.map(lambda path: compiled(path, args.arch.split(","), args.build, includes), sources)
        return sorted((k for kernels in found for k in kernels), key=lambda k: (k.short, k.arch))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="HMMA counts HGMMA too, LDS LDSM, LDG LDGSTS; '-' is not known."
    )
    parser.add_argument("objects", nargs="*", type=Path, help="objects, libraries or cubins to read instead")
    parser.add_argument("--arch", default="sm_80,sm_90a", help="architectures to compile for (sm_80,sm_90a)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sass", help="where compiled kernels are kept")
    parser.add_argument("--jobs", type=int, help="compilers at a time (one per CPU)")
    parser.add_argument("--match", default="", help="only sources whose name has this pattern")
    args = parser.parse_args(argv)
    try:
        kernels = collect(args)
    except (NoTool, RuntimeError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    print(*table(kernels), sep="\n")
    if not find_tool("nvdisasm"):
        print("no instructions: nvdisasm was not found (pip install nvidia-cuda-nvdisasm)")
    failed = sum(any(True for _ in faults(k)) for k in kernels)
    names = {k.short.split("<")[0] for k in kernels}
    absent = [] if args.objects or args.match else [name for name in MATRIX_KERNELS if name not in names]
    for name in absent:
        print(f"FAILED: there is no {name}, which is to use the tensor cores")
    print(f"{len(kernels) - failed} kernels passed, {failed + len(absent)} failed")
    return 1 if failed or absent or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
