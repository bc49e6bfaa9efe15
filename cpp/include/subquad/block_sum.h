/// Sums over the keys that each compressed column stands for.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// The adjoint of expand_values.
///
///   x[b,h,n,c] = sum over the ranks r < visible[b,n] with col(r) = c of y[b,h,n,key of rank r]
///
/// @param y          [B, H, N, M]  f32; what a row does not see may be NaN
/// @param visible    [B, N]        i32 in [0, M]: how many keys each row sees, by rank (visible_keys.h)
/// @param positions  [B, M]        i32: the key of each rank, ascending; optional: rank r is key r
/// @param x          [B, H, N, K]  f32; K at least 1; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: sums in the order of the ranks; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void block_sum(const Queue& queue, ConstTensor y, ConstTensor visible, ConstTensor positions, Tensor x);

}  // namespace subquad
