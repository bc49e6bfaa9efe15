"""What losses of an estimator need of a teacher: the mass of every block, and two sums over the row.

    P = softmax of scale <q_n, k_m> over the keys m that row n sees
    masses_nc = sum_{m in block c} P_nm,   sum_squares_n = sum_m P_nm^2,   sum_plogp_n = sum_m P_nm ln P_nm

A row without keys gives 0.
"""

import numpy as np

from .block_sum import block_sum
from .pairs import clear_masked, repeat_heads
from .softmax_attention import log_softmax_sum, softmax_logits, softmax_scale


def softmax_rows(q, k, scale, key_mask, query_mask, is_causal, dtype):
    """-> P [B, H, N, M] and ln P (0 where a key is not seen)."""
    scale = softmax_scale(scale, q.shape[-1], dtype)
    q, k = clear_masked(q, query_mask, dtype), repeat_heads(clear_masked(k, key_mask, dtype), q.shape[1])
    x = softmax_logits(q, k, key_mask, query_mask, is_causal, None, scale, None, 0, None)
    p, lse = log_softmax_sum(x)
    with np.errstate(invalid="ignore"):
        return p, np.where(np.isneginf(x), dtype(0), x - lse[..., None])


def teacher_blocks(q, k, num_columns, *, scale=None, key_mask=None, query_mask=None, is_causal=False, dtype=np.float64):
    """q [B, H, N, D], k [B, Hkv, M, D] -> masses [B, H, N, K], sum_squares [B, H, N], sum_plogp [B, H, N]."""
    masks = dict(key_mask=key_mask, query_mask=query_mask, is_causal=is_causal)
    p, log_p = softmax_rows(q, k, scale, dtype=dtype, **masks)
    return block_sum(p, num_columns, dtype=dtype, **masks), (p * p).sum(axis=-1), (p * log_p).sum(axis=-1)
