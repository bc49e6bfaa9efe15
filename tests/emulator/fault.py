"""A slip in a CUDA kernel, and the test cases that must notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    what: str
    file: str  # below cuda/src; `old`, found there once, becomes `new`
    old: str
    new: str
    test: str  # the program of tests/cpp, and a part of the names of its cases
    case: str
    unit: str = ""  # only .cu files whose names contain this are compiled anew

    def __str__(self):
        return f"{self.test}: {self.file}: {self.what}"
