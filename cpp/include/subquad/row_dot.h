/// Inner products of the rows of two arrays.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// out[b,h,n] = <x[b,h,n,:], y[b,h,n,:] - z[b,h,n,:]>, without z if it is not given.
///
/// @param x, y, z  [B, H, N, D]  f32 | f16 | bf16, each its own; z optional
/// @param out      [B, H, N]     f32; every element is written; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated.
///
/// Promises: no allocation; f32 arithmetic; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void row_dot(const Queue& queue, ConstTensor x, ConstTensor y, ConstTensor z, Tensor out);

}  // namespace subquad
