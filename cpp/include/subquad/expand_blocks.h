/// A pattern of blocks as CSR.
#pragma once
#include "subquad/sparse_pattern.h"

namespace subquad {

/// The first pass: where each row of the CSR form begins, and with its last entry how many entries there are.
///
///   indptr[r] = number of entries of the rows before r = (b H + h) N + n
///
/// @param pattern  a pattern of blocks (sparse_pattern.h)
/// @param num_keys  M
/// @param indptr   [B H N + 1]  i64; must not overlap the pattern
/// @throws std::invalid_argument or TypeMismatch if the pattern is of another form or not sound; Unsupported if no
///         kernel fits (on the CPU: 2^31 keys or more).
///
/// Promises: deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void expand_blocks_indptr(const Queue& queue, const SparsePattern& pattern, int64_t num_keys,
                                      Tensor indptr);

/// The second pass: the keys of every row, ascending.
///
/// @param indptr   [B H N + 1]  i64 as expand_blocks_indptr wrote it
/// @param indices  [nnz]        i32, nnz >= the last entry of indptr (checked on the CPU); must not overlap the others
SUBQUAD_API void expand_blocks(const Queue& queue, const SparsePattern& pattern, int64_t num_keys, ConstTensor indptr,
                               Tensor indices);

}  // namespace subquad
