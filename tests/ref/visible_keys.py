"""How many keys a query sees, and where the keys that the mask keeps are.

counts_bn = |{m : key_mask_bm, m <= n + (M - N) if causal}|, 0 for a masked query
positions_br = the r-th kept key of item b, -1 behind the last
"""

import numpy as np


def visible_counts(key_mask, query_mask, batch, num_queries, num_keys, is_causal):
    """[B, N] int32, without an array of the length of the keys where there is no mask."""
    reached = np.full(num_queries, num_keys)
    if is_causal:
        reached = np.clip(np.arange(num_queries) + 1 + num_keys - num_queries, 0, num_keys)
    counts = np.broadcast_to(reached, (batch, num_queries))
    if key_mask is not None:
        before = np.pad(np.cumsum(np.asarray(key_mask, bool), axis=1), ((0, 0), (1, 0)))  # kept keys below m
        counts = before[:, reached]
    if query_mask is not None:
        counts = np.where(np.asarray(query_mask, bool), counts, 0)
    return np.ascontiguousarray(counts, np.int32)


def visible_keys(key_mask=None, query_mask=None, *, batch, num_queries, num_keys, is_causal=False):
    """-> counts [B, N] int32, positions [B, M] int32."""
    positions = np.full((batch, num_keys), -1, np.int32)
    for b in range(batch):
        kept = np.arange(num_keys) if key_mask is None else np.nonzero(np.asarray(key_mask, bool)[b])[0]
        positions[b, : len(kept)] = kept
    return visible_counts(key_mask, query_mask, batch, num_queries, num_keys, is_causal), positions
