/// The k largest scores of every group, by a threshold instead of a sort.
#pragma once
#include "subquad/options.h"
#include "subquad/tensor.h"

namespace subquad {

struct TopkSelectOptions {
  int64_t k = 1;  ///< in [1, 2^31)
  Group group = Group::query;
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional: a masked key is no candidate
  bool is_causal = false;  ///< query n has the candidates m <= n + (M - N)
};

/// Selects min(k, candidates) entries of every group.
///
/// A larger value comes first; equal values (-0 and +0 are equal) by the lower flat index; NaN behind everything else,
/// also behind -inf. Flat indices inside a group are those of options.h: query: m; row_heads: h M + m; head: n M + m;
/// batch: (h N + n) M + m.
///
/// @param scores   [B, H, N, M]  f32 | f16 | bf16
/// @param indices  query: [B, H, N, k];  row_heads: [B, N, k];  head: [B, H, k];  batch: [B, k]   i32: the flat indices
///                 of the selected entries, ascending; -1 behind them. Must not overlap the others.
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits (a group of
///         2^31 entries or more).
///
/// Promises: linear time; deterministic, the same for any number of threads; asynchronous on a CUDA queue.
SUBQUAD_API void topk_select(const Queue& queue, ConstTensor scores, const TopkSelectOptions& options, Tensor indices,
                             Workspace workspace);
SUBQUAD_API int64_t topk_select_workspace_bytes(const Queue& queue, ConstTensor scores,
                                                const TopkSelectOptions& options, Tensor indices);

}  // namespace subquad
