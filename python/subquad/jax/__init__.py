"""subquad for jax on the CPU: the operators under jit, grad and vmap.

With values at hand a call is the plain function's; while jax traces, it becomes a custom call of XLA, which reads XLA's
buffers without a copy. Either costs about 20 us more than a call with numpy arrays. The custom call takes the whole of
a sharded array; jax.shard_map(..., check_vma=False) keeps the shards.
"""

from .functional import collision_attention, yoso_attention

__all__ = ["collision_attention", "yoso_attention"]
