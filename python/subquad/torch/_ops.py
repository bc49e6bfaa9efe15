"""The table of operators with autograd: one entry each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import hashing, methods
from ._register import Description, Operator

__all__ = ["COLLISION_ATTENTION", "YOSO_ATTENTION"]

_QKV = {"q": "B H N D", "k": "B Hkv M D", "v": "B Hkv M E"}
_MASKS = {"key_mask": "B M", "query_mask": "B N"}


def _collision_attention(*, grad: str, **arguments: Any) -> Tensor:
    """`grad` concerns the backward pass alone."""
    return hashing.collision_attention(**arguments)


YOSO_ATTENTION = Operator(
    Description(
        name="yoso_attention",
        arrays=_QKV,
        masks=_MASKS,
        options="int num_hashes=32, int hash_bits=8, str hashing='hadamard', str carving='strided', "
        "Tensor? planes=None, Tensor? signs=None, bool expectation=False, bool is_causal=False, bool normalize=True, "
        "SymInt seed=0, Tensor? seed_tensor=None, str? grad=None",
        result="B H N E",
        has_lse=lambda given: given["normalize"],
        forward=methods.yoso_attention,
        backward=methods.yoso_attention_bwd,
    )
)

COLLISION_ATTENTION = Operator(
    Description(
        name="collision_attention",
        arrays=_QKV,
        masks=_MASKS,
        options="int hash_bits, str grad='exact', bool is_causal=False",
        result="B H N E",
        has_lse=lambda given: False,
        forward=_collision_attention,
        backward=hashing.collision_attention_bwd,
    )
)
