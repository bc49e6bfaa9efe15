"""subquad for torch: the operators with autograd, torch.compile, vmap and autocast, and attention layers."""

from .features import feature_map, linear_attention, rfa_attention
from .hashing import collision_attention, yoso_attention
from .nn import EvaAttention, LaraAttention, RfaAttention, YosoAttention
from .randomized import eva_attention, lara_attention, randomized_attention
from .softmax import merge_states, segment_mean, softmax_attention

__all__ = [
    "EvaAttention",
    "LaraAttention",
    "RfaAttention",
    "YosoAttention",
    "collision_attention",
    "eva_attention",
    "feature_map",
    "lara_attention",
    "linear_attention",
    "merge_states",
    "randomized_attention",
    "rfa_attention",
    "segment_mean",
    "softmax_attention",
    "yoso_attention",
]
