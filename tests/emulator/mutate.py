"""The mutation check: every fault of faults.py, put into a CUDA kernel, must make a test fail on the emulator.

    python tests/emulator/mutate.py [--list] [-k PART] [--build FOLDER]

FOLDER is a build with -DSUBQUAD_CUDA=EMULATE -DSUBQUAD_DEV=ON, made if it is not there. A mutant is the test program of
that build, linked with new objects of the .cu files that the fault reaches. Exit status 0 only if all are caught.
"""

import argparse
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = (("fwd", "late"), ("fwd", "early"), ("rand:1", "rand"), ("rand:2", "rand"))
SECONDS = 60  # A mutant that takes longer hangs, which is as good as failing.


def build(folder, programs):
    """Builds the programs; how each .cu file is compiled."""
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DSUBQUAD_CUDA=EMULATE", "-DSUBQUAD_DEV=ON"]
    subprocess.run(
        [*configure, "-DSUBQUAD_PYTHON=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    jobs = str(os.cpu_count())
    subprocess.run(
        ["cmake", "--build", folder, "-j", jobs, "--target", *programs], check=True, stdout=subprocess.DEVNULL
    )
    commands = json.loads((folder / "compile_commands.json").read_text())
    return {Path(c["file"]).name: c for c in commands if c["file"].endswith(".cu")}


def reaches(source, file):
    """True if a .cu file is or includes, at any depth, the header `file` (both below cuda/src)."""
    folder, seen, left = ROOT / "cuda/src", set(), [source]
    while left:
        name = left.pop()
        if name == file:
            return True
        if name not in seen:
            seen.add(name)
            text = (folder / name).read_text()
            left += [i for i in re.findall(r'#\s*include "([^"]+)"', text) if (folder / i).exists()]
    return False


def mutated(fault):
    return (ROOT / "cuda/src" / fault.file).read_text().replace(fault.old, fault.new)


def check_texts(faults):
    """A kernel that has changed must not pass for one without the fault."""
    wrong = []
    for fault in faults:
        path = ROOT / "cuda/src" / fault.file
        count = path.read_text().count(fault.old) if path.exists() else 0
        if count != 1 or fault.old == fault.new:
            wrong.append(f"{fault}: its text is found {count} times, expected once: {fault.old!r}")
    if wrong:
        raise SystemExit("\n".join(wrong))


def run_quietly(words, fault, what, **options):
    run = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    if run.returncode:
        raise SystemExit(f"{fault}: the mutant does not {what}\n{run.stderr[:2000]}")


def compile_mutant(fault, commands, place):
    """Objects of the .cu files that the fault reaches."""
    source = place / "src"
    source.mkdir()
    for path in (ROOT / "cuda/src").rglob("*.cu*"):
        copy = source / path.relative_to(ROOT / "cuda/src")
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(mutated(fault) if str(path.relative_to(ROOT / "cuda/src")) == fault.file else path.read_text())
    (source / "table.h").write_text((ROOT / "cuda/src/table.h").read_text())
    objects = []
    for name, command in commands.items():
        if fault.unit not in name or not reaches(name, fault.file):
            continue
        objects.append(place / f"{name}.o")
        kernels = str(Path(command["file"]).parent)
        words = [w.replace(kernels, str(source)) for w in shlex.split(command["command"])]
        words = [w for w in words if not re.fullmatch(r"-O\d|-g", w)]
        words[words.index("-o") + 1] = str(objects[-1])
        run_quietly([*words, "-O1", "-w"], fault, "compile", cwd=command["directory"])
    if not objects:
        raise SystemExit(f"{fault}: no .cu file called {fault.unit!r} includes it")
    return objects


def link_mutant(fault, objects, commands, folder, place):
    """The mutant's test program. The linker takes an object given by name before one of the archive."""
    program = place / fault.test
    tests = (folder / f"tests/cpp/CMakeFiles/{fault.test}.dir").rglob("*.o")
    words = shlex.split(next(iter(commands.values()))["command"])
    compiler = [words[0], *(w for w in words if w.startswith("-fsanitize="))]
    archive = folder / "cpp/libsubquad.a"
    run_quietly([*compiler, *tests, *objects, archive, "-o", program, "-pthread", "-ldl"], fault, "link")
    return program


def failure(program, case, schedule):
    """None if the cases pass under a schedule, else in a few words what happened."""
    order, landing = schedule
    knobs = {"EMULATOR_ORDER": order, "EMULATOR_ASYNC": landing, "SUBQUAD_TEST_ISA": "cuda_emulated"}
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": SECONDS}
    try:
        run = subprocess.run([program, case], env={**os.environ, **knobs}, **options)
    except subprocess.TimeoutExpired:
        return f"{order} {landing}: hangs"
    if run.returncode == 0:
        return None
    said = re.search(r"emulator: .*", run.stderr)
    return f"{order} {landing}: {said.group(0) if said else f'exit status {run.returncode}'}"


@functools.cache
def check_unmutated(program, case, schedule):
    """What is to catch a fault passes without one; a part that names no case fails here."""
    failed = failure(program, case, schedule)
    if failed:
        raise SystemExit(f"without a fault {program.name} {case} fails: {failed}")


def try_fault(fault, commands, folder):
    """How the fault was caught, or None."""
    with tempfile.TemporaryDirectory() as place:
        objects = compile_mutant(fault, commands, Path(place))
        program = link_mutant(fault, objects, commands, folder, Path(place))
        for schedule in SCHEDULES:
            caught = failure(program, fault.case, schedule)
            if caught:
                check_unmutated(folder / "tests/cpp" / fault.test, fault.case, schedule)
                return caught


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only name the faults")
    parser.add_argument("-k", metavar="PART", default="", help="only faults whose line contains PART")
    parser.add_argument("--build", type=Path, default=ROOT / "build/emulate", metavar="FOLDER")
    arguments = parser.parse_args()
    faults = [f for f in FAULTS if arguments.k in str(f)]
    if not faults:
        raise SystemExit(f"no fault's line contains {arguments.k!r}")
    check_texts(faults)
    if arguments.list:
        return print(*faults, sep="\n")
    folder = arguments.build.resolve()
    commands = build(folder, sorted({f.test for f in faults}))
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault, caught in pool.map(lambda f: (f, try_fault(f, commands, folder)), faults):
            missed += not caught
            print(f"{fault}: {caught or 'MISSED'}", flush=True)
    print(f"{len(faults) - missed} caught, {missed} missed")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
