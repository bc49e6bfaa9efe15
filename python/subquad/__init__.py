"""Attention whose cost does not grow as N^2, on numpy, torch, cupy and jax arrays.

Importing this package loads numpy and no other framework; `subquad.torch` holds the operators with autograd.
"""

from . import cpu, cuda
from ._ext import UnsupportedError
from ._version import __version__
from .distillation import (
    attention_divergence,
    attention_divergence_bwd,
    block_sum,
    expand_values,
    teacher_blocks,
)
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
from .heatmap import attention_heatmap
from .methods import yoso_attention, yoso_attention_bwd
from .patterns import BlockPattern, CsrPattern, expand_blocks, transpose_pattern
from .random import random_normal, random_signs, random_uniform
from .randomized import (
    lara_attention,
    lara_attention_bwd,
    randomized_attention,
    randomized_attention_bwd,
    rfa_attention,
    rfa_attention_bwd,
)
from .sea import (
    block_pool,
    block_pool_bwd,
    running_mean,
    running_mean_bwd,
    sea_attention,
    sea_attention_bwd,
    sea_estimate,
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
from .sparse import (
    select_blocks,
    sparse_attention,
    sparse_attention_bwd,
    topk_select,
    visible_keys,
)

__all__ = [
    "BlockPattern",
    "CsrPattern",
    "UnsupportedError",
    "__version__",
    "attention_divergence",
    "attention_divergence_bwd",
    "attention_heatmap",
    "block_pool",
    "block_pool_bwd",
    "block_sum",
    "bucket_attention",
    "bucket_attention_bwd",
    "bucket_gradient",
    "bucket_sort",
    "collision_attention",
    "collision_attention_bwd",
    "cpu",
    "cuda",
    "eva_attention",
    "eva_attention_bwd",
    "expand_blocks",
    "expand_values",
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
    "running_mean",
    "running_mean_bwd",
    "sampled_proposals",
    "sampled_proposals_bwd",
    "sea_attention",
    "sea_attention_bwd",
    "sea_estimate",
    "segment_mean",
    "segment_mean_bwd",
    "select_blocks",
    "softmax_attention",
    "softmax_attention_bwd",
    "softmax_sample",
    "sparse_attention",
    "sparse_attention_bwd",
    "sum_arrays",
    "teacher_blocks",
    "topk_select",
    "transpose_pattern",
    "visible_keys",
    "yoso_attention",
    "yoso_attention_bwd",
]
