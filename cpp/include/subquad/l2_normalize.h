/// Rows scaled to unit length, with the logarithm of their length.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// y[b,h,n,:] = x[b,h,n,:] / |x[b,h,n,:]|,   lse[b,h,n] = ln |x[b,h,n,:]|;   a zero row stays zero, with lse = -inf.
///
/// @param x    [B, H, N, D]  f32 | f16 | bf16; D in [1, 512]
/// @param y    [B, H, N, D]  f32 | f16 | bf16; may be x itself (same address, strides and dtype), else must not overlap
///        it
/// @param lse  [B, H, N]     f32; optional
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512; on CUDA: above 256).
///
/// Promises: no overflow or underflow for any finite row; f32 arithmetic; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void l2_normalize(const Queue& queue, ConstTensor x, Tensor y, Tensor lse);

/// dx = (dy - y <y, dy>) / |x|, and 0 for a row with lse = -inf.
///
/// @param dy   [B, H, N, D]  f32 | f16 | bf16
/// @param y    [B, H, N, D]  f32 | f16 | bf16, as l2_normalize wrote it
/// @param lse  [B, H, N]     f32, as l2_normalize wrote it
/// @param dx   [B, H, N, D]  f32 | f16 | bf16; must not overlap the inputs
SUBQUAD_API void l2_normalize_bwd(const Queue& queue, ConstTensor dy, ConstTensor y, ConstTensor lse, Tensor dx);

}  // namespace subquad
