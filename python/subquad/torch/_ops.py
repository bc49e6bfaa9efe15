"""The table of operators with autograd: one entry each."""

from __future__ import annotations

from .. import _differentiable as plain
from ._register import Description, Operator

__all__ = ["COLLISION_ATTENTION", "YOSO_ATTENTION"]

YOSO_ATTENTION = Operator(
    Description(
        **plain.YOSO_ATTENTION,
        options="int num_hashes=32, int hash_bits=8, str hashing='hadamard', str carving='strided', "
        "Tensor? planes=None, Tensor? signs=None, bool expectation=False, bool is_causal=False, bool normalize=True, "
        "SymInt seed=0, Tensor? seed_tensor=None, str? grad=None",
    )
)

COLLISION_ATTENTION = Operator(
    Description(
        **plain.COLLISION_ATTENTION,
        options="int hash_bits, str grad='exact', bool is_causal=False",
    )
)
