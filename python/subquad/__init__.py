"""Attention whose cost does not grow as N^2, on numpy, torch, cupy and jax arrays.

Importing this package loads numpy and no other framework; `subquad.torch` holds the operators with autograd.
"""

from . import cpu
from ._ext import UnsupportedError
from ._version import __version__
from .hashing import (
    bucket_attention,
    bucket_attention_bwd,
    bucket_gradient,
    bucket_sort,
    collision_attention,
    collision_attention_bwd,
    l2_normalize,
    l2_normalize_bwd,
    lsh_hash,
)
from .methods import yoso_attention, yoso_attention_bwd
from .random import random_normal, random_signs, random_uniform

__all__ = [
    "UnsupportedError",
    "__version__",
    "bucket_attention",
    "bucket_attention_bwd",
    "bucket_gradient",
    "bucket_sort",
    "collision_attention",
    "collision_attention_bwd",
    "cpu",
    "l2_normalize",
    "l2_normalize_bwd",
    "lsh_hash",
    "random_normal",
    "random_signs",
    "random_uniform",
    "yoso_attention",
    "yoso_attention_bwd",
]
