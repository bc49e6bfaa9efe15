"""The entries of a block pattern as CSR: row by row, ascending keys."""

import numpy as np

from .patterns import Csr, block_entries


def expand_blocks(blocks):
    """-> Csr: indptr [B*H*N + 1] int64, indices [nnz] int32, shape (B, H, N, M)."""
    shape = np.shape(blocks.bits)[:3]
    b, h, n, m = block_entries(blocks)
    counts = np.zeros(shape, np.int64)
    np.add.at(counts, (b, h, n), 1)
    num_keys = blocks.num_keys
    if num_keys is None:
        longest = int(np.max(blocks.visible, initial=0))
        num_keys = longest if blocks.positions is None else blocks.positions.shape[1]
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Csr(indptr, m.astype(np.int32), (*shape, num_keys))
