/// Compressed columns spread over the keys that they stand for.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Nearest interpolation of every row to its visible keys.
///
///   y[b,h,n,key of rank r] = x[b,h,n,col(r)] for the ranks r < visible[b,n],   0 elsewhere
///   col(r) = floor(((2 r + 1) K - 1) / (2 visible[b,n]))
///
/// For inspection and tests: y is an N x M array. The adjoint of block_sum.
///
/// @param x          [B, H, N, K]  f32; K at least 1
/// @param visible    [B, N]        i32 in [0, M]: how many keys each row sees, by rank (visible_keys.h)
/// @param positions  [B, M]        i32: the key of each rank, ascending; optional: rank r is key r
/// @param y          [B, H, N, M]  f32; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void expand_values(const Queue& queue, ConstTensor x, ConstTensor visible, ConstTensor positions, Tensor y);

}  // namespace subquad
