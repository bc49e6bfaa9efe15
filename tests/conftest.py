"""Fixtures that run one test body on every row of kernels and in every framework."""

import os

import numpy as np
import pytest

import device_arrays
import subquad
from subquad import _arrays

# jax takes the first GPU it sees, and most of its memory. Here arrays are on the CPU unless a test says otherwise.
os.environ.setdefault("JAX_DEFAULT_DEVICE", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_EMULATED = "cuda_emulated"


def _device_rows():
    """The CUDA kernels: run by the CPU in a build that emulates them, and on a device where there is one."""
    rows = [_EMULATED] if _EMULATED in subquad.cpu.available() else []
    return rows if device_arrays.why_no_cuda() else [*rows, "cuda"]


def pytest_generate_tests(metafunc):
    """A test with `isa` runs on every row of CPU kernels, and if it is marked `backends` on the CUDA kernels too."""
    if "isa" not in metafunc.fixturenames:
        return
    rows = [row for row in subquad.cpu.available() if row != _EMULATED]
    if metafunc.definition.get_closest_marker("backends"):
        rows += [pytest.param(row, marks=pytest.mark.cuda) for row in _device_rows()]
    metafunc.parametrize("isa", rows, indirect=True)


@pytest.fixture
def isa(request, monkeypatch):
    """The row of kernels that the test body runs on, and on nothing else; "cuda" is the first CUDA device."""
    if request.param == "cuda":
        device_arrays.install(monkeypatch, "cuda")
        yield request.param
        return
    before = subquad.cpu.isa()
    subquad.cpu.set_isa(request.param)
    yield request.param
    assert subquad.cpu.isa() == request.param
    subquad.cpu.set_isa(before)


def _poison_numpy(out):
    if out.dtype.name == "bfloat16":
        out.view(np.uint16)[...] = 0x7FC0  # not every cupy fills it with NaN
    elif out.size:
        out[...] = np.nan if out.dtype.kind not in "iu" else 0x5A if out.dtype.itemsize == 1 else 0x5A5A
    return out


def _poison_torch(out):
    import torch

    if out.dtype in (torch.uint16, torch.uint8):
        out.view(torch.uint8).fill_(0x5A)  # uint16 has no fill in every torch version; its bytes have
    else:
        out.fill_(float("nan") if out.is_floating_point() else 0x5A5A)
    return out


def _poison_cupy(out):
    with out.device:
        return _poison_numpy(out)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Results start as NaN (integers as 0x5a5a), so that an element nobody writes is seen."""
    poisons = {"Numpy": _poison_numpy, "Torch": _poison_torch, "Jax": _poison_numpy, "Cupy": _poison_cupy}
    for framework, poison in ((getattr(_arrays, name), poison) for name, poison in poisons.items()):
        empty = framework.empty
        monkeypatch.setattr(
            framework,
            "empty",
            staticmethod(lambda shape, dtype, like, empty=empty, poison=poison: poison(empty(shape, dtype, like))),
        )


def _to_torch(x):
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def _from_torch(x):
    import torch

    return x.to(torch.float32).numpy() if x.is_floating_point() else x.numpy()


def _to_jax(x):
    import jax

    return jax.numpy.asarray(x)


class Framework:
    """How a test makes arrays of one framework from numpy ones, and back (floats as float32 or wider)."""

    def __init__(self, name, make, read):
        self.name, self.make, self.read = name, make, read

    def arrays(self, *xs):
        return tuple(None if x is None else self.make(x) for x in xs)


@pytest.fixture(params=["numpy", "torch", "jax"])
def framework(request):
    if request.param == "numpy":
        return Framework(
            "numpy", lambda x: x, lambda x: np.asarray(x, np.float32 if x.dtype.kind not in "iu" else None)
        )
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    if request.param == "torch":
        return Framework("torch", _to_torch, _from_torch)
    return Framework(
        "jax", _to_jax, lambda x: np.asarray(x).astype(np.float32) if x.dtype.kind not in "iu" else np.asarray(x)
    )
