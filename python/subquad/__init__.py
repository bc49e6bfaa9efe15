"""Attention whose cost does not grow as N^2, on numpy, torch, cupy and jax arrays.

Importing this package loads numpy and no other framework; `subquad.torch` holds the operators with autograd.
"""

from . import cpu
from ._ext import UnsupportedError
from ._version import __version__
from .eva import eva_attention, eva_attention_bwd
from .features import (
    feature_map,
    feature_map_bwd,
    linear_attention,
    linear_attention_bwd,
    mixture_proposals,
    mixture_proposals_bwd,
    mixture_weights,
    mixture_weights_bwd,
    orthogonal_projection,
    sampled_proposals,
    sampled_proposals_bwd,
)
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
from .randomized import (
    lara_attention,
    lara_attention_bwd,
    randomized_attention,
    randomized_attention_bwd,
    rfa_attention,
    rfa_attention_bwd,
)
from .softmax import (
    merge_states,
    merge_states_bwd,
    row_dot,
    segment_mean,
    segment_mean_bwd,
    softmax_attention,
    softmax_attention_bwd,
    softmax_sample,
    sum_arrays,
)

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
    "eva_attention",
    "eva_attention_bwd",
    "feature_map",
    "feature_map_bwd",
    "l2_normalize",
    "l2_normalize_bwd",
    "lara_attention",
    "lara_attention_bwd",
    "linear_attention",
    "linear_attention_bwd",
    "lsh_hash",
    "merge_states",
    "merge_states_bwd",
    "mixture_proposals",
    "mixture_proposals_bwd",
    "mixture_weights",
    "mixture_weights_bwd",
    "orthogonal_projection",
    "random_normal",
    "random_signs",
    "random_uniform",
    "randomized_attention",
    "randomized_attention_bwd",
    "rfa_attention",
    "rfa_attention_bwd",
    "row_dot",
    "sampled_proposals",
    "sampled_proposals_bwd",
    "segment_mean",
    "segment_mean_bwd",
    "softmax_attention",
    "softmax_attention_bwd",
    "softmax_sample",
    "sum_arrays",
    "yoso_attention",
    "yoso_attention_bwd",
]
