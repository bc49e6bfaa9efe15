/// The columns of SEA's estimated attention that are attended to.
#pragma once
#include "subquad/options.h"
#include "subquad/tensor.h"

namespace subquad {

struct SelectBlocksOptions {
  double top_k = 64;  ///< k: keys wanted per query and head on average; finite, at least 1, may be a fraction
  Group group = Group::row_heads;
  BudgetRule budget = BudgetRule::code;
  bool skip_dead = false;  ///< columns of width 0 (a row with fewer than K visible keys has some) are no candidates
};

/// Selects the largest probabilities of every group, as many as its budget.
///
/// With n = visible[b, row], H heads, K columns and rhe(x) = x rounded to the nearest integer, ties to even, of the
/// exact quotient:
///
///   code:   query rhe(k K / n),  head rhe(k K),  batch rhe(H k K),  row_heads rhe(H k K / n)
///   paper:  r(n) = max(1, rhe(k K / n));  query r(n),  row_heads H r(n),  head sum over its rows with n > 0 of r(n),
///           batch H times that
///
/// each clamped to [1, candidates]. Candidates are the columns of the rows with n > 0; a group without one selects
/// nothing. The order is that of topk_select: NaN last, ties to the lower flat index. A column stands for about n / K
/// keys, so that k keys are selected per query and head on average.
/// Source: Lee et al., ICLR 2024 (SEA), 3.2; `code` is its published code, by exact integers.
///
/// @param probs    [B, H, N, K]  f32; K in [1, 2^20]
/// @param visible  [B, N]        i32, at least 0
/// @param bits     [B, H, N, ceil(K / 8)]  u8, a member of a SparsePattern; every byte is written; must not overlap the
///                 others
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits (a group of
///         2^31 entries or more).
///
/// Promises: linear time; deterministic, the same for any number of threads; in the groups `query` and `row_heads` a
/// row depends on no other; asynchronous on a CUDA queue.
SUBQUAD_API void select_blocks(const Queue& queue, ConstTensor probs, ConstTensor visible,
                               const SelectBlocksOptions& options, Tensor bits, Workspace workspace);
SUBQUAD_API int64_t select_blocks_workspace_bytes(const Queue& queue, ConstTensor probs, ConstTensor visible,
                                                  const SelectBlocksOptions& options, Tensor bits);

}  // namespace subquad
