"""The public functions on another device: tests written for numpy run there with their arrays moved to it and back."""

import functools
import importlib.util
import inspect

import numpy as np

import subquad

_VECTOR = 16  # bytes: arrays keep their offset from a multiple of it, which decides how kernels load


def why_no_cuda():
    """Why nothing can run on a CUDA device here; "" where it can."""
    if not subquad.cuda.is_built():
        return "this build has no CUDA kernels"
    if not subquad.cuda.is_available():
        return f"no CUDA device: {subquad.cuda.why_none()}"
    if importlib.util.find_spec("torch") is None:
        return "torch, which makes the CUDA arrays, is not installed"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _memory_of(x):
    """All elements from the first to the last one of an array without negative strides, holes too, as a flat view."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)) // x.itemsize
    return np.lib.stride_tricks.as_strided(x, (last + 1,), (x.itemsize,))


def to_device(x, device):
    """A torch tensor of the values and, where no stride is negative, the strides and the alignment of a numpy array."""
    import torch

    if any(step < 0 or step % x.itemsize for step in x.strides):
        x = x.copy()
    is_bfloat16 = x.dtype.name == "bfloat16"
    if x.size == 0:
        empty = torch.from_numpy(np.empty(x.shape, np.uint16 if is_bfloat16 else x.dtype)).to(device)
        return empty.view(torch.bfloat16) if is_bfloat16 else empty
    flat = _memory_of(x)
    start = x.__array_interface__["data"][0] % _VECTOR // x.itemsize
    padded = np.zeros(start + flat.size, flat.dtype)
    padded[start:] = flat
    base = torch.from_numpy(padded.view(np.uint16) if is_bfloat16 else padded).to(device)
    base = base.view(torch.bfloat16) if is_bfloat16 else base
    return base.as_strided(x.shape, [step // x.itemsize for step in x.strides], start)


def from_device(tensor):
    """A numpy array of the tensor's values; bfloat16 by ml_dtypes."""
    import torch

    host = tensor.detach().cpu()
    if host.dtype != torch.bfloat16:
        return host.numpy()
    import ml_dtypes

    return host.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


class _Moves:
    """The arrays of one call; an array that is given twice is moved once."""

    def __init__(self, device):
        self.device, self.moved = device, {}

    def there(self, x):
        if isinstance(x, np.ndarray):
            if id(x) not in self.moved:
                self.moved[id(x)] = (x, to_device(x, self.device))
            return self.moved[id(x)][1]
        if isinstance(x, (tuple, list)):
            return type(x)([self.there(item) for item in x])
        return x

    def back(self, result):
        if isinstance(result, tuple):
            return tuple(self.back(item) for item in result)
        assert result.device.type == self.device, f"the result is on {result.device}, not on {self.device}"
        for array, tensor in self.moved.values():
            if tensor is result:
                return self.write(array, tensor)
        return from_device(result)

    @staticmethod
    def write(array, tensor):
        """An output of the caller's, with what a kernel may have done to the holes in it."""
        if any(step < 0 for step in array.strides):
            array[...] = from_device(tensor)
        elif array.size:
            span = tensor.as_strided((_memory_of(array).size,), (1,))
            _memory_of(array)[...] = from_device(span)
        return array


def on_device(function, device):
    """`function` with the numpy arrays of its arguments and results moved. Other arrays it takes as they are."""
    draws = "out" in inspect.signature(function).parameters and "shape" in inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*arguments, **keywords):
        moves = _Moves(device)
        if draws and keywords.get("out") is None:
            import torch

            shape = np.broadcast_shapes(arguments[0] if arguments else keywords["shape"])
            keywords = keywords | {"out": torch.empty(shape, device=device)}
            return from_device(function(*arguments, **keywords))
        arguments, keywords = moves.there(list(arguments)), {n: moves.there(x) for n, x in keywords.items()}
        result = function(*arguments, **keywords)
        return moves.back(result) if moves.moved else result

    return call


def install(monkeypatch, device):
    """Puts every public function that takes arrays on `device` until the test ends."""
    for name in subquad.__all__:
        function = getattr(subquad, name)
        if inspect.isfunction(function):
            monkeypatch.setattr(subquad, name, on_device(function, device))
