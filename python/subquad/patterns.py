"""Sparse patterns: which keys each query attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from . import _ext
from ._arrays import Array, Call

__all__ = ["BlockPattern", "CsrPattern", "expand_blocks", "transpose_pattern"]


class _Matrix:
    """What both patterns offer to libraries of sparse matrices: B * H * N rows of M columns."""

    def __repr__(self) -> str:
        """Arrays by dtype and shape alone: their values would flood a terminal."""
        shown = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_csr(self) -> CsrPattern:
        raise NotImplementedError

    def to_scipy(self, values: Array = None) -> Any:
        """A scipy.sparse.csr_array [B * H * N, M] of float32: `values` [nnz], by default e^log_weights or ones."""
        from scipy.sparse import csr_array

        csr = self.to_csr()
        parts = [np.asarray(x) for x in (csr._values(values), csr.indices, csr.indptr)]
        return csr_array(tuple(parts), shape=csr.matrix_shape)

    def to_torch(self, values: Array = None) -> Any:
        """A torch.sparse_csr tensor [B * H * N, M] of float32; `values` as in to_scipy."""
        import torch

        csr = self.to_csr()
        parts = [torch.as_tensor(x) for x in (csr.indptr, csr.indices, csr._values(values))]
        return torch.sparse_csr_tensor(parts[0].long(), parts[1].long(), parts[2], csr.matrix_shape)

    def to_cupy(self, values: Array = None) -> Any:
        """A cupyx.scipy.sparse.csr_matrix [B * H * N, M] of float32; `values` as in to_scipy."""
        import cupy
        from cupyx.scipy.sparse import csr_matrix

        csr = self.to_csr()
        parts = [cupy.asarray(x) for x in (csr._values(values), csr.indices, csr.indptr)]
        return csr_matrix(tuple(parts), shape=csr.matrix_shape)


@dataclass(frozen=True, eq=False, repr=False)
class CsrPattern(_Matrix):
    """A pattern as compressed rows; row (b * H + h) * N + n holds the keys of query n.

    indptr: [B * H * N + 1] int32 or int64, from 0, never falling. indices: [nnz] int32, strictly ascending in a row.
    shape: (B, H, N, M). log_weights: [nnz] float32 added to the logits, -inf allowed; None: 0.
    Values are checked where the pattern is used, not here.
    """

    indptr: Array
    indices: Array
    shape: tuple[int, int, int, int]
    log_weights: Array = None

    def __post_init__(self) -> None:
        shape = _four(self.shape)
        if shape is None:
            raise ValueError(f"[CsrPattern] shape: expected (B, H, N, M), got {_short(self.shape)}")
        object.__setattr__(self, "shape", shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        batch, heads, seq_q, seq_k = self.shape
        return batch * heads * seq_q, seq_k

    @classmethod
    def from_scipy(cls, matrix: Any, shape: tuple[int, int, int, int]) -> CsrPattern:
        """The pattern of a scipy CSR matrix or array [B * H * N, M] in canonical form; log_weights are the logarithms
        of its values, None where all of them are 1."""
        _expect_csr("from_scipy", matrix)
        return cls._from("from_scipy", np, matrix.indptr, matrix.indices, matrix.data, matrix.shape, shape)

    @classmethod
    def from_cupy(cls, matrix: Any, shape: tuple[int, int, int, int]) -> CsrPattern:
        """As from_scipy, of a cupyx matrix; its arrays stay on the device."""
        _expect_csr("from_cupy", matrix)
        import cupy

        return cls._from("from_cupy", cupy, matrix.indptr, matrix.indices, matrix.data, matrix.shape, shape)

    @classmethod
    def from_torch(cls, tensor: Any, shape: tuple[int, int, int, int]) -> CsrPattern:
        """As from_scipy, of a torch.sparse_csr tensor."""
        if str(getattr(tensor, "layout", "")) != "torch.sparse_csr":
            raise TypeError(f"[from_torch] tensor: expected one of layout torch.sparse_csr, got {_short(tensor)}")
        import torch

        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values().detach())
        return cls._from("from_torch", torch, *parts, tensor.shape, shape)

    @classmethod
    def _from(cls, op: str, xp: Any, indptr: Any, indices: Any, values: Any, given: Any, shape: Any) -> CsrPattern:
        """xp: the module of the arrays, which all have log, asarray, int32 and float32."""
        axes = _four(shape)
        if axes is None or tuple(given) != (math.prod(axes[:3]), axes[3]):
            rule = f"(B, H, N, M) with B * H * N, M = {tuple(given)}"
            raise ValueError(f"[{op}] shape: expected {rule}, got {_short(shape)}")
        indices = xp.asarray(indices, dtype=xp.int32)
        if bool((values == 1).all()):
            return cls(indptr, indices, axes)
        if not bool((values >= 0).all()):
            raise ValueError(
                f"[{op}] values: expected numbers of at least 0, whose logarithms are the log_weights, got a negative "
                "one or NaN"
            )
        with np.errstate(divide="ignore"):
            logs = xp.log(values)
        return cls(indptr, indices, axes, xp.asarray(logs, dtype=xp.float32))

    def to_csr(self) -> CsrPattern:
        return self

    def _values(self, values: Array) -> Array:
        if values is not None:
            if tuple(np.shape(values)) != tuple(self.indices.shape):
                rule = f"expected shape [nnz] = {list(self.indices.shape)}, got {list(np.shape(values))}"
                raise ValueError(f"[CsrPattern] values: {rule}")
            return values
        if self.log_weights is None:
            return np.ones(self.indices.shape, np.float32)
        return np.exp(np.asarray(self.log_weights))


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern(_Matrix):
    """A pattern as one bit per compressed column: ceil(K / 8) bytes for a row of any length.

    In a row with n = visible[b, row] keys, column c stands for the ranks start(c) .. start(c + 1) - 1,
    start(c) = (2 c n + K) // (2 K), of which the newest block_cap are kept. Rank r is key r, or positions[b, r].

    bits: [B, H, N, ceil(K / 8)] uint8; column c is bit c % 8 of byte c // 8. K: the number of columns.
    visible: [B, N] int32, 0 for a masked query. positions: [B, M] int32, the r-th valid key of each item, or None: all
    are valid. These two carry the masks and is_causal of the call that made the pattern.
    num_keys: M, the columns of the matrix; None: M of positions, else the largest of visible.
    Values are checked where the pattern is used, not here.
    """

    bits: Array
    K: int
    visible: Array
    block_cap: int
    positions: Array = None
    num_keys: int | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)"""
        keys = self.num_keys
        if keys is None and self.positions is not None:
            keys = self.positions.shape[1]
        if keys is None:
            keys = int(self.visible.max()) if math.prod(self.visible.shape) else 0
        batch, heads, seq, _ = self.bits.shape
        return batch, heads, seq, keys

    def to_csr(self) -> CsrPattern:
        """The same matrix as compressed rows."""
        return expand_blocks(self)


def _short(value: Any) -> str:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _four(shape: Any) -> tuple[int, int, int, int] | None:
    """Four extents, or None if `shape` is something else."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        return None
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0 for n in shape):
        return None
    return int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3])


_NO_PATTERN: dict[str, Any] = dict.fromkeys(("indices", "log_weights", "indptr", "bits", "visible", "positions"))
_NO_PATTERN |= {"K": 0, "block_cap": 0}
_ARRAYS = ("indices", "log_weights", "indptr", "bits", "visible", "positions")


def enter_pattern(call: Call, pattern: Any, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """A pattern of any form as the compiled module takes it. shape: (B, H, N, M) of the call that uses it."""
    if isinstance(pattern, BlockPattern):
        parts = {name: getattr(pattern, name) for name in ("bits", "K", "visible", "block_cap", "positions")}
        _expect_array(call, "pattern bits", pattern.bits)
        _expect_array(call, "pattern visible", pattern.visible)
        parts["K"] = call.extent("K", pattern.K)
        num_keys = None if pattern.num_keys is None else call.extent("num_keys", pattern.num_keys, 0)
        if shape is not None and num_keys not in (None, shape[3]):
            raise ValueError(f"[{call.op}] pattern: expected num_keys = M = {shape[3]}, got {num_keys}")
    elif isinstance(pattern, CsrPattern):
        parts = {"indptr": pattern.indptr, "indices": pattern.indices, "log_weights": pattern.log_weights}
        _expect_array(call, "pattern indptr", pattern.indptr)
        _expect_array(call, "pattern indices", pattern.indices)
        if shape is not None and pattern.shape != shape:
            raise ValueError(
                f"[{call.op}] pattern: expected shape [B, H, N, M] = {list(shape)}, got {list(pattern.shape)}"
            )
    elif isinstance(pattern, (tuple, list)):
        if len(pattern) != 2:
            raise ValueError(f"[{call.op}] pattern: expected a pair (indices, log_weights), got {len(pattern)} values")
        parts = {"indices": pattern[0], "log_weights": pattern[1]}
        _expect_array(call, "pattern indices", pattern[0])
        _expect_array(call, "pattern log_weights", pattern[1])
    elif hasattr(pattern, "shape") and not hasattr(pattern, "indptr") and not getattr(pattern, "is_sparse_csr", False):
        parts = {"indices": pattern}
    else:
        rule = "an array of indices, a pair (indices, log_weights), a CsrPattern or a BlockPattern"
        fix = ": see CsrPattern.from_scipy, from_torch, from_cupy" if hasattr(pattern, "shape") else ""
        raise TypeError(f"[{call.op}] pattern: expected {rule}, got {type(pattern).__name__}{fix}")
    return call.keywords(_NO_PATTERN | parts, *_ARRAYS)


def _expect_csr(op: str, matrix: Any) -> None:
    if getattr(matrix, "format", None) != "csr":
        raise TypeError(f"[{op}] matrix: expected a sparse matrix of format csr, got {type(matrix).__name__}")


def _expect_array(call: Call, name: str, value: Any) -> None:
    if not hasattr(value, "shape"):
        raise TypeError(f"[{call.op}] {name}: expected an array, got {type(value).__name__}")


def indptr_of(call: Call, parts: dict[str, Any], num_keys: int) -> Array:
    """Where the rows of a pattern of blocks begin as CSR; the last entry is the number of entries."""
    shape = tuple(parts["bits"].shape)
    if len(shape) != 4:
        raise ValueError(f"[{call.op}] bits: expected shape [B, H, N, ceil(K / 8)], got {list(shape)}")
    indptr = call.framework.empty((math.prod(shape[:3]) + 1,), "int64", parts["bits"])
    call.run(_ext.expand_blocks_indptr, parts, num_keys, indptr)
    return indptr


def expand_blocks(pattern: BlockPattern) -> CsrPattern:
    """A pattern of blocks as compressed rows: indptr int64, indices ascending in a row."""
    op = "expand_blocks"
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"[{op}] pattern: expected a BlockPattern, got {type(pattern).__name__}")
    call = Call(op, bits=pattern.bits, visible=pattern.visible, positions=pattern.positions)
    for name, axes in (("bits", "B H N K/8"), ("visible", "B N"), ("positions", "B M")):
        if name != "positions" or pattern.positions is not None:
            call.shape(name, axes)
    if _short(pattern.visible).partition("[")[0] != "int32":
        raise TypeError(f"[{op}] visible: expected dtype int32, got {_short(pattern.visible).partition('[')[0]}")
    parts = enter_pattern(call, pattern)
    shape = (*pattern.shape[:3], call.extent("num_keys", pattern.shape[3], 0))
    indptr = indptr_of(call, parts, shape[3])
    indices = call.empty((int(indptr[-1]),), "bits", "int32")
    _ext.expand_blocks(parts, shape[3], indptr, indices)
    return CsrPattern(call.leave(indptr), call.leave(indices), shape)


def transpose_pattern(pattern: CsrPattern) -> tuple[Array, Array, Array]:
    """The queries of every key.

    Returns key_indptr [B * H * M + 1] int64, rows [nnz] int32 and order [nnz] int64: the entries of key m of head (b,
    h) are key_indptr[c] .. key_indptr[c + 1] - 1 with c = (b * H + h) * M + m; their queries are `rows`, ascending, and
    `order` says where in pattern.indices each of them stands.
    """
    op = "transpose_pattern"
    if not isinstance(pattern, CsrPattern):
        raise TypeError(f"[{op}] pattern: expected a CsrPattern, got {type(pattern).__name__}")
    call = Call(op, indices=pattern.indices)
    parts = enter_pattern(call, pattern)
    batch, heads, _, seq_k = pattern.shape
    nnz = call.shape("indices", "nnz")[0]
    key_indptr = call.empty((batch * heads * seq_k + 1,), "indices", "int64")
    rows, order = call.empty((nnz,), "indices", "int32"), call.empty((nnz,), "indices", "int64")
    _ext.transpose_pattern(parts, *pattern.shape, key_indptr, rows, order)
    return call.leave(key_indptr, rows, order)
