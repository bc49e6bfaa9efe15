"""subquad for torch: the operators with autograd, torch.compile, vmap and autocast, and attention layers."""

from .functional import collision_attention, yoso_attention
from .nn import YosoAttention

__all__ = ["YosoAttention", "collision_attention", "yoso_attention"]
