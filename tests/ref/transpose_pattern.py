"""The transpose of a CSR pattern: for each key the rows that take it, ascending, and where each entry was."""

import numpy as np


def transpose_pattern(pattern):
    """-> indptr [B*H*M + 1] int64, rows [nnz] int32, order [nnz] int64 with pattern.indices[order] = the keys."""
    batch, heads, seq_q, seq_k = pattern.shape
    owner = np.repeat(np.arange(batch * heads * seq_q), np.diff(pattern.indptr))
    key = owner // max(seq_q, 1) * seq_k + np.asarray(pattern.indices)
    order = np.argsort(key, kind="stable").astype(np.int64)
    counts = np.bincount(key, minlength=batch * heads * seq_k)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return indptr, (owner[order] % max(seq_q, 1)).astype(np.int32), order
