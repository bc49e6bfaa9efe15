/// How many keys every query sees, and which key is the r-th valid one.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Ranks of keys under masks.
///
///   counts[b,n]    = number of valid keys m of item b, causal: with m <= n + (M - N); 0 for a masked query
///   positions[b,r] = the r-th valid key of item b; -1 behind the last
///
/// @param key_mask    [B, M]  bool, True = keep; optional
/// @param query_mask  [B, N]  bool, True = keep; optional
/// @param counts      [B, N]  i32; must not overlap the masks
/// @param positions   [B, M]  i32; optional; must not overlap the masks or counts
/// @param num_keys    M below 2^31
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(B (N + M)) time; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void visible_keys(const Queue& queue, ConstTensor key_mask, ConstTensor query_mask, bool is_causal,
                              int64_t num_keys, Tensor counts, Tensor positions);

}  // namespace subquad
