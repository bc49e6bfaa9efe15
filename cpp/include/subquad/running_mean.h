/// The mean of the values seen so far.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// What came before the first value, or is left behind the last one.
struct RunningMeanState {
  Tensor sum;    ///< [B, H, E] f32: of the valid values
  Tensor count;  ///< [B]       i32, at least 0: how many; with those of the call below 2^31
};

/// Running mean over the valid tokens.
///
///   out[b,h,n,:] = (sum_bh + sum over valid m <= n + (M - N) of v[b,h,m,:]) / (count_b + their number)
///
/// and 0 where there is none.
///
/// Source: the context of SEA (Lee et al., ICLR 2024), causal; divided by the valid tokens, so that padding changes
/// nothing.
///
/// @param v         [B, H, M, E]  f32 | f16 | bf16; E in [1, 512]
/// @param key_mask  [B, M]        bool, True = keep; optional. A masked value has no effect, not even with NaN in it.
/// @param state     optional: both members or none
/// @param out       [B, H, N, E]  f32 | f16 | bf16; must not overlap the inputs
/// @param new_state  behind the last value; optional; may be `state` itself
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N + M) time; sums in f32; a row does not change a bit when later values do; deterministic, the same
/// bits for any number of threads; asynchronous on a CUDA queue.
SUBQUAD_API void running_mean(const Queue& queue, ConstTensor v, ConstTensor key_mask, const RunningMeanState& state,
                              Tensor out, const RunningMeanState& new_state, Workspace workspace);
SUBQUAD_API int64_t running_mean_workspace_bytes(const Queue& queue, ConstTensor v, ConstTensor key_mask,
                                                 const RunningMeanState& state, Tensor out,
                                                 const RunningMeanState& new_state);

/// Its gradient: dv_m = sum over n with m <= n + (M - N) of dout_n / count_n, 0 for a masked value. The state is a
/// constant, of which only the count is used.
///
/// @param dout  [B, H, N, E]  f32 | f16 | bf16
/// @param base  [B, H, M, E]  f32 | f16 | bf16, added to the gradient before it is rounded; optional
/// @param dv    [B, H, M, E]  f32 | f16 | bf16; must not overlap the others
SUBQUAD_API void running_mean_bwd(const Queue& queue, ConstTensor dout, ConstTensor base, ConstTensor key_mask,
                                  const RunningMeanState& state, Tensor dv, Workspace workspace);
SUBQUAD_API int64_t running_mean_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor base,
                                                     ConstTensor key_mask, const RunningMeanState& state, Tensor dv);

}  // namespace subquad
