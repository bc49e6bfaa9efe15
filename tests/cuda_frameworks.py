"""How tests make CUDA arrays of each framework from numpy ones, and back."""

import numpy as np
import pytest

import device_arrays

DEVICE = "cuda"

why_not = device_arrays.why_no_cuda()
# For a module's `pytestmark`.
needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(bool(why_not), reason=why_not or "there is a device")]


class OnCuda:
    """`make(array)`, `read(array)` (floats as float32) and `dtype(array)`, the name of its dtype."""

    def __init__(self, make, to_numpy):
        self.make, self.to_numpy = make, to_numpy

    def arrays(self, *xs):
        return tuple(None if x is None else self.make(x) for x in xs)

    def read(self, x):
        host = self.to_numpy(x)
        return host if host.dtype.kind in "iub" else np.asarray(host, np.float32)

    def dtype(self, x):
        return str(x.dtype).removeprefix("torch.")


def torch_on_cuda():
    return OnCuda(lambda x: device_arrays.to_device(x, DEVICE), device_arrays.from_device)


def cupy_on_cuda():
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")

    def make(x):
        try:
            made = cupy.asarray(x)
            made.__dlpack__(stream=-1)
            return made
        except (BufferError, TypeError, ValueError) as error:
            if x.dtype.name != "bfloat16":
                raise
            pytest.skip(f"cupy {cupy.__version__} has no bfloat16 to share: {error}")

    return OnCuda(make, cupy.asnumpy)


def jax_device():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    try:
        return jax.devices(DEVICE)[0]
    except RuntimeError as error:
        pytest.skip(f"jax has no CUDA device: {error}")


def jax_on_cuda():
    import jax

    device = jax_device()
    return OnCuda(lambda x: jax.device_put(x, device), np.asarray)
