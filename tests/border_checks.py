"""What the tests of the array border ask of one array."""

import re

import numpy as np
import pytest

from subquad import _ext

describe = _ext._describe
F = np.float32
BASE = np.arange(2 * 3 * 4 * 5, dtype=F).reshape(2, 3, 4, 5)


def require(module):
    return pytest.importorskip(module, reason=f"{module} is not installed")


def refused(error, words, array, writable=False):
    with pytest.raises(error, match=r"^\[describe\] array: expected .+, got ") as caught:
        describe(array, writable)
    assert type(caught.value) is error
    assert re.search(words, str(caught.value)), str(caught.value)


def same_memory(x, view=None):
    """Asserts that the border sees the numpy array `x` (`view` is what was handed to it, if not x itself)."""
    dtype, shape, strides, device, address = describe(x if view is None else view)
    assert (dtype, shape, device) == (x.dtype.name, x.shape, "cpu")
    if x.size:
        assert address == x.__array_interface__["data"][0]
        assert [s for s, n in zip(strides, shape, strict=True) if n > 1] == [
            s // x.itemsize for s, n in zip(x.strides, shape, strict=True) if n > 1
        ]
    else:
        assert address == 0 and set(strides) <= {0}


def unaligned(dtype):
    return np.zeros(4 * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype)
