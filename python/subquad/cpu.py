"""Which CPU kernels run, and on how many threads.

Every kernel is compiled once per instruction set ("row"); the best row of the machine is chosen on first use. The
environment variable SUBQUAD_ISA, or `set_isa`, forces another one.
"""

from . import _ext

__all__ = ["available", "compiled", "free_scratch", "isa", "num_threads", "set_isa"]


def isa() -> str:
    """Name of the row in use, for example "x86_64_v4". ValueError if SUBQUAD_ISA names one this machine cannot run."""
    return _ext.cpu_isa()


def set_isa(name: str) -> None:
    """Use the row `name` for all later calls of this process. ValueError if it is unknown or this machine lacks it."""
    if not isinstance(name, str):
        raise TypeError(f"[cpu] isa: expected a name, got {type(name).__name__}")
    _ext.cpu_set_isa(name)


def available() -> list[str]:
    """Names of the rows this machine can run, slowest first."""
    return _ext.cpu_available()


def compiled() -> list[str]:
    """Names of the rows in this build, whether or not this machine can run them."""
    return _ext.cpu_compiled()


def num_threads() -> int:
    """Threads a call uses: SUBQUAD_NUM_THREADS, else what torch or another OpenMP user has set, else
    OMP_NUM_THREADS, else the CPUs this process may run on."""
    return _ext.num_threads()


def free_scratch() -> None:
    """Give back the scratch memory that this thread keeps from its last calls (at most 256 MiB) for its next one."""
    _ext.free_scratch()
