"""Keys to columns: out_nc = sum of y_nm over the keys m of block c of row n; the adjoint of expand_values."""

import numpy as np

from .block_map import block_membership
from .pairs import weighted_sum


def block_sum(y, num_columns, *, key_mask=None, query_mask=None, is_causal=False, dtype=np.float64):
    """y [B, H, N, M] -> [B, H, N, K]."""
    batch, _, seq_q, seq_k = y.shape
    members = block_membership(batch, seq_q, seq_k, num_columns, key_mask, query_mask, is_causal)
    members = np.broadcast_to(members, (*y.shape[:3], num_columns, seq_k))
    return weighted_sum(members.astype(dtype), np.asarray(y).astype(dtype)[..., None])[..., 0]
