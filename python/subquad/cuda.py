"""CUDA devices: what the build has kernels for, and what the driver shows.

Device arrays need no call of this module: they go through the same functions as arrays on the CPU, on their device and
on the current stream of their framework.
"""

from . import _ext

__all__ = ["architectures", "devices", "is_available", "is_built", "why_none"]


def is_built() -> bool:
    """Whether this build has CUDA kernels."""
    return _ext.cuda_build() is not None


def architectures() -> str:
    """Compute capabilities that have code in this build, for example "80-real 90a-real 90-virtual"; "" without CUDA."""
    build = _ext.cuda_build()
    return "" if build is None else build[1]


def devices() -> list[tuple[str, tuple[int, int], int, int]]:
    """(name, compute capability, multiprocessors, bytes of memory) of every device; [] without a driver or device."""
    return _ext.cuda_devices()


def is_available() -> bool:
    """Whether calls with CUDA arrays can work: the build has kernels and there is a device."""
    return bool(_ext.cuda_devices())


def why_none() -> str:
    """Why devices() is empty; "" if it is not."""
    return _ext.cuda_why_none()
