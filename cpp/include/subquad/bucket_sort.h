/// Tokens grouped by bucket: a stable counting sort of codes.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// order[b,h,r,:] lists the token indices by ascending code, equal codes in token order, tokens with mask False last;
/// bucket c holds order[b,h,r, offsets[b,h,r,c] .. offsets[b,h,r,c+1]), and offsets[b,h,r,num_buckets] counts valid
/// tokens.
///
/// @param codes        [B, H, R, N]                u16 | i32, values in [0, num_buckets) (checked on the CPU, and on
///        CUDA with SUBQUAD_CHECK=1).
/// @param num_buckets  in [1, 2^24].
/// @param mask         [B, N]                      bool, True = keep; optional.
/// @param order        [B, H, R, N]                i32
/// @param offsets      [B, H, R, num_buckets + 1]  i32
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N + num_buckets) per (b, h, r); deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void bucket_sort(const Queue& queue, ConstTensor codes, int64_t num_buckets, ConstTensor mask, Tensor order,
                             Tensor offsets, Workspace workspace);
SUBQUAD_API int64_t bucket_sort_workspace_bytes(const Queue& queue, ConstTensor codes, int64_t num_buckets,
                                                ConstTensor mask, Tensor order, Tensor offsets);

}  // namespace subquad
