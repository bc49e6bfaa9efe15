"""subquad for jax: the operators under jit, grad and vmap.

With values on the CPU at hand a call is the plain function's. While jax traces, and on CUDA devices, it becomes a
custom call of XLA, which reads XLA's buffers without a copy. Either costs about 20 us more than a call with numpy
arrays; on CUDA devices outside jax.jit, where jax prepares every call anew, several times that. The custom call takes
the whole of a sharded array; jax.shard_map(..., check_vma=False) keeps the shards. vmap folds its axis into the batch,
and repeats the call where an argument without a batch axis is mapped.
"""

from .features import feature_map, linear_attention, rfa_attention
from .hashing import collision_attention, yoso_attention
from .randomized import eva_attention, lara_attention, randomized_attention
from .softmax import merge_states, segment_mean, softmax_attention
from .sparse import (
    attention_divergence,
    block_pool,
    block_sum,
    expand_values,
    running_mean,
    sea_attention,
    sea_estimate,
    sparse_attention,
    teacher_blocks,
)

__all__ = [
    "attention_divergence",
    "block_pool",
    "block_sum",
    "collision_attention",
    "eva_attention",
    "expand_values",
    "feature_map",
    "lara_attention",
    "linear_attention",
    "merge_states",
    "randomized_attention",
    "rfa_attention",
    "running_mean",
    "sea_attention",
    "sea_estimate",
    "segment_mean",
    "softmax_attention",
    "sparse_attention",
    "teacher_blocks",
    "yoso_attention",
]
