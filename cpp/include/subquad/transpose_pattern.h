/// The queries of every key: a CSR pattern turned round.
#pragma once
#include "subquad/sparse_pattern.h"

namespace subquad {

/// Transposes the N x M matrix of every (b, h).
///
///   key_indptr[c] .. key_indptr[c + 1]: the entries of key row c = (b H + h) M + m, with `rows` their query rows n,
///   ascending, and `order` their places in pattern.indices
///
/// @param pattern     CSR (sparse_pattern.h)
/// @param batch, heads, seq_q, seq_k  [B, H, N, M], the shape of the matrix
/// @param key_indptr  [B H M + 1]  i64
/// @param rows        [nnz]        i32
/// @param order       [nnz]        i64; the outputs must not overlap the pattern or each other
/// @throws std::invalid_argument or TypeMismatch if the pattern is of another form or not sound; Unsupported if no
///         kernel fits.
///
/// Promises: O(nnz + B H (N + M)) time; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void transpose_pattern(const Queue& queue, const SparsePattern& pattern, int64_t batch, int64_t heads,
                                   int64_t seq_q, int64_t seq_k, Tensor key_indptr, Tensor rows, Tensor order,
                                   Workspace workspace);
SUBQUAD_API int64_t transpose_pattern_workspace_bytes(const Queue& queue, const SparsePattern& pattern, int64_t batch,
                                                      int64_t heads, int64_t seq_q, int64_t seq_k, Tensor key_indptr,
                                                      Tensor rows, Tensor order);

}  // namespace subquad
