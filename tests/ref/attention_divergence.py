"""How far the attention rows of a student are from those of a teacher.

    kl_n = sum_m Pt_nm ln(Pt_nm / Ps_nm),   sse_n = sum_m (Ps_nm - Pt_nm)^2

over the keys that row n sees; 0 for a row without keys.
"""

import numpy as np

from .pairs import clear_masked, repeat_heads, sum_groups, weighted_sum
from .softmax_attention import softmax_scale
from .teacher_blocks import softmax_rows


def attention_divergence(
    q, k, q_teacher, k_teacher, *, scale=None, scale_teacher=None, key_mask=None, query_mask=None, is_causal=False,
    dtype=np.float64,
):  # fmt: skip
    """-> kl [B, H, N], sse [B, H, N]."""
    masks = key_mask, query_mask, is_causal, dtype
    ps, log_ps = softmax_rows(q, k, scale, *masks)
    pt, log_pt = softmax_rows(q_teacher, k_teacher, scale_teacher, *masks)
    return (pt * (log_pt - log_ps)).sum(axis=-1), ((ps - pt) ** 2).sum(axis=-1)


def attention_divergence_bwd(
    dkl, dsse, q, k, q_teacher, k_teacher, *, scale=None, scale_teacher=None, key_mask=None, query_mask=None,
    is_causal=False, dtype=np.float64,
):  # fmt: skip
    """-> dq, dk of the student; dkl or dsse may be None.

    dx_m = dkl (Ps_m - Pt_m) + 2 dsse Ps_m (Ps_m - Pt_m - sum_j Ps_j (Ps_j - Pt_j))
    """
    masks = key_mask, query_mask, is_causal, dtype
    ps, _ = softmax_rows(q, k, scale, *masks)
    pt, _ = softmax_rows(q_teacher, k_teacher, scale_teacher, *masks)
    scale, difference = softmax_scale(scale, q.shape[-1], dtype), ps - pt
    dx = np.zeros_like(ps)
    if dkl is not None:
        dx = dx + np.asarray(dkl).astype(dtype)[..., None] * difference
    if dsse is not None:
        slopes = dtype(2) * ps * (difference - (ps * difference).sum(axis=-1, keepdims=True))
        dx = dx + np.asarray(dsse).astype(dtype)[..., None] * slopes
    dx = np.where((ps != 0) | (pt != 0), dx, dtype(0))
    heads_kv, q = k.shape[1], clear_masked(q, query_mask, dtype)
    k = repeat_heads(clear_masked(k, key_mask, dtype), q.shape[1])
    return scale * weighted_sum(dx, k), sum_groups(scale * weighted_sum(dx.swapaxes(-1, -2), q), heads_kv)
