"""The built-in sample: q, k and v of a trained text encoder reading the first chapter of a novel of 1865.

`load_sample` reads it. Model, text, licences, what was captured and how the file is made again: `PROVENANCE.txt`,
which is also `load_sample().provenance`. `capture.py` made the file; only it needs torch and transformers.
"""

from __future__ import annotations

import operator
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sample", "load_sample"]


class Sample(NamedTuple):
    """q, k, v of [1, H, N, D] float32; labels[h] says which layer and head of the model h is."""

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    labels: tuple[str, ...]
    provenance: str


def load_sample(seq: int | None = None) -> Sample:
    """Real attention inputs: 4 heads of all-MiniLM-L6-v2 on 2048 tokens of "Alice's Adventures in Wonderland".

    The model reads 512 tokens at a time. Tokens 0..511 are one such window, and `load_sample(512)` is what the model
    attends over; longer samples put consecutive windows of the text one after another, so that positions repeat every
    512 tokens. The softmax temperature is the usual D**-0.5, no mask applies, and the values were rounded to float16.

    Licence: the values derive from weights published under Apache-2.0; the text is in the public domain.

    Args:
        seq: tokens to return, the first of the text, in 1..2048; None for all.

    Returns:
        Sample(q, k, v, labels, provenance), arrays [1, 4, seq, 32] float32, contiguous and the caller's own.

    Raises:
        ValueError: seq is out of range.
        TypeError: seq is not an integer.
    """
    data = resources.files(__name__)
    with data.joinpath("sample.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = [stored[name] for name in ("q", "k", "v")]
        labels = tuple(str(label) for label in stored["labels"])
    available = arrays[0].shape[2]
    try:
        length = available if seq is None else operator.index(seq)
    except TypeError:
        raise TypeError(f"[load_sample] seq: expected an integer or None, got {seq!r}") from None
    if not 1 <= length <= available:
        raise ValueError(f"[load_sample] seq: expected 1..{available}, got {length}")
    q, k, v = (np.ascontiguousarray(x[:, :, :length], dtype=np.float32) for x in arrays)
    return Sample(q, k, v, labels, data.joinpath("PROVENANCE.txt").read_text(encoding="ascii"))
