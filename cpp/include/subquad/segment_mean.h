/// Means of consecutive tokens, over the valid ones only.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Give one of num_segments and segment_size.
struct SegmentMeanOptions {
  /// Cuts the V valid tokens of an item, in their order, into S = min(num_segments, V) segments: the first
  /// S (V / S + 1) - V of V / S tokens, the others of one more. Padding changes nothing.
  int64_t num_segments = 0;
  /// Segment c is tokens [c size, (c + 1) size); the last may be short.
  int64_t segment_size = 0;
  ConstTensor mask;  ///< [B, N] bool, True = keep; optional. A masked token has no effect, not even with NaN in it.
  /// [B, N'] bool, with num_segments only; optional: S = min(num_segments, V, V'), V' being the number of its valid
  /// tokens, so that two sequences get equally many segments.
  ConstTensor paired_mask;
  bool unit_counts = false;  ///< counts above 1 are written as 1
};

/// Segment means.
///
///   out[b,h,c,:] = (1 / counts[b,c]) sum over the valid tokens n of segment c of x[b,h,n,:],   0 where there is none
///
/// @param x       [B, H, N, D]  f32 | f16 | bf16; D in [1, 512]
/// @param out     [B, H, C, D]  f32 | f16 | bf16; C = num_segments or ceil(N / segment_size); must not overlap x
/// @param counts  [B, C]        i32, the number of valid tokens of each segment, or f32, its natural logarithm (-inf
///                for 0), what a softmax over segments takes as a bias; optional
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N) time; sums in f32 in token order; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void segment_mean(const Queue& queue, ConstTensor x, const SegmentMeanOptions& options, Tensor out,
                              Tensor counts, Workspace workspace);
SUBQUAD_API int64_t segment_mean_workspace_bytes(const Queue& queue, ConstTensor x, const SegmentMeanOptions& options,
                                                 Tensor out, Tensor counts);

/// Its gradient: every valid token gets dout / count of its segment, every other token 0.
///
/// @param dout  [B, H, C, D]  f32 | f16 | bf16
/// @param base  [B, H, N, D]  f32 | f16 | bf16, added to the gradient before it is rounded; optional
/// @param dx    [B, H, N, D]  f32 | f16 | bf16; must not overlap the others
SUBQUAD_API void segment_mean_bwd(const Queue& queue, ConstTensor dout, ConstTensor base,
                                  const SegmentMeanOptions& options, Tensor dx, Workspace workspace);
SUBQUAD_API int64_t segment_mean_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor base,
                                                     const SegmentMeanOptions& options, Tensor dx);

}  // namespace subquad
