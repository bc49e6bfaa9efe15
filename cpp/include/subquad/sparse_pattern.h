/// Which keys each query attends to.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// A sparse B x H x N x M matrix in one of three forms; the members of one are defined, the others are not.
///
/// Indices: a list of keys per query.
///   indices      [B, 1 | Hkv | H, N, S]  i32, keys in [0, M) in any order; -1 = none; a repeated key counts again
///   log_weights  like indices            f32, added to the logits, -inf allowed; optional
/// CSR: rows r = (b H + h) N + n.
///   indptr       [B H N + 1]  i32 | i64, from 0, never falling; its last entry is nnz
///   indices      [nnz]        i32, strictly ascending inside a row
///   log_weights  [nnz]        f32, optional
/// Blocks: one bit per compressed column. In a row with n = visible[b, row] keys, column c stands for the ranks
/// [start(c), start(c + 1)), start(c) = floor((2 c n + K) / (2 K)). Of each column whose bit is set the newest
/// block_cap ranks are kept: [max(start(c), start(c + 1) - block_cap), start(c + 1)). Rank r is key r, or positions[b, r].
///   bits         [B, H, N, ceil(K / 8)]  u8; column c is bit c % 8 of byte c / 8; bits behind K count for nothing
///   visible      [B, N]  i32 in [0, M]
///   positions    [B, M]  i32, ascending keys in [0, M) for the ranks below the largest of visible[b, :]; optional
///   num_columns  K in [1, 2^20];  block_cap at least 1
/// Source of the blocks: Lee et al., ICLR 2024 (SEA), nearest interpolation in exact integers.
struct SparsePattern {
  ConstTensor indices, log_weights;
  ConstTensor indptr;
  ConstTensor bits, visible, positions;
  int64_t num_columns = 0, block_cap = 0;
};

}  // namespace subquad
