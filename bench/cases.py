"""Work of each method in float operations and bytes of memory traffic: the least that any implementation needs."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    heads: int = 8
    seq: int = 4096
    dim: int = 64

    @property
    def tokens(self) -> int:
        return self.batch * self.heads * self.seq


def attention_bytes(shape: Shape, itemsize: int = 4) -> int:
    """q, k, v read once and the output written once."""
    return 4 * shape.tokens * shape.dim * itemsize


def exact_flops(shape: Shape, backward: bool = False) -> int:
    """Two products of N^2 D multiply-adds forward, five more backward."""
    return (2 + 5 * backward) * 2 * shape.tokens * shape.seq * shape.dim


def yoso_flops(shape: Shape, hashes: int, bits: int, backward: bool = False, samples: int = 4) -> int:
    """Hashing both sides by P transforms of three rounds, one addition per (token, hash, column) to scatter and one to
    gather; backward: hashing again, the transposed sum, and `samples` pairs per (row, hash) on both sides, each a dot
    product and a scaled addition."""
    padded = max(64, 1 << (shape.dim - 1).bit_length())
    parts = -(-hashes * bits // padded)
    hashing = 2 * shape.tokens * parts * 3 * padded * int(log2(padded))
    tables = 2 * shape.tokens * hashes * shape.dim
    pairs = 2 * shape.tokens * hashes * samples * 4 * shape.dim
    return hashing + tables + backward * (hashing + tables + pairs)


def yoso_table_bytes(shape: Shape, hashes: int) -> int:
    """Traffic of the tables, in a cache if they fit: read, written and read again per (token, hash, column)."""
    return 3 * shape.tokens * hashes * shape.dim * 4


def rfa_flops(shape: Shape, features: int, causal: bool = False, chunk: int = 64) -> int:
    """Features of both sides, the sums over keys and what queries read of them; causal: and the pairs of each chunk."""
    products = 4 * 2 * shape.tokens * features * shape.dim
    pairs = 2 * shape.tokens * chunk * (features + shape.dim) // 2
    return products + causal * pairs


def lara_flops(shape: Shape, landmarks: int) -> int:
    """Two products to probe the keys, two to read, one for the weights alpha and one for their normalisers."""
    return 6 * 2 * shape.tokens * landmarks * shape.dim


def eva_flops(shape: Shape, window: int, chunk: int, causal: bool = False) -> int:
    """The block and the chunks, for scores and for values, and beta."""
    chunks = shape.seq // chunk
    seen = (window + chunks) / (2 if causal else 1)
    return int(2 * 2 * shape.tokens * shape.dim * (seen + 1))
