"""What every adapter with automatic differentiation has to know of a function f and its f_bwd: one entry each.

arrays: the differentiable arguments in the order of their gradients, and their axes. masks: arguments that may be None
and have no gradient. result: the axes of the result. has_lse: whether f, under these options, offers return_lse.
forward, backward: the plain functions; both take every option.
"""

from __future__ import annotations

from typing import Any

from . import hashing, methods

__all__ = ["COLLISION_ATTENTION", "YOSO_ATTENTION"]

_QKV: dict[str, Any] = {
    "arrays": {"q": "B H N D", "k": "B Hkv M D", "v": "B Hkv M E"},
    "masks": {"key_mask": "B M", "query_mask": "B N"},
    "result": "B H N E",
}


def _collision_attention(*, grad: str, **arguments: Any) -> Any:
    """`grad` concerns the backward pass alone, but a wrong one is an error at once."""
    if grad not in ("exact", "lower_bound"):
        raise ValueError(f'[collision_attention] grad: expected "exact" or "lower_bound", got {grad!r}')
    return hashing.collision_attention(**arguments)


YOSO_ATTENTION: dict[str, Any] = _QKV | {
    "name": "yoso_attention",
    "has_lse": lambda options: options["normalize"],
    "forward": methods.yoso_attention,
    "backward": methods.yoso_attention_bwd,
}

COLLISION_ATTENTION: dict[str, Any] = _QKV | {
    "name": "collision_attention",
    "has_lse": lambda options: False,
    "forward": _collision_attention,
    "backward": hashing.collision_attention_bwd,
}
