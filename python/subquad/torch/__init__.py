"""subquad for torch: the operators with autograd, torch.compile, vmap and autocast, and attention layers."""

from . import sea_losses
from .features import feature_map, linear_attention, rfa_attention
from .hashing import collision_attention, yoso_attention
from .nn import EvaAttention, LaraAttention, RfaAttention, SeaAttention, YosoAttention
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
    "EvaAttention",
    "LaraAttention",
    "RfaAttention",
    "SeaAttention",
    "YosoAttention",
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
    "sea_losses",
    "segment_mean",
    "softmax_attention",
    "sparse_attention",
    "teacher_blocks",
    "yoso_attention",
]
