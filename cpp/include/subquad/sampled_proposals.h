/// Samples of the proposal distribution of randomized attention, at drawn keys.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Samples around the sum of a query and a key.
///
///   w[b,h,s,n,:] = q[b,h,n,:] + k[b,g,indices[b,h,s,n],:] + noise_std * noise[b,h,s,n,:],   0 where the index is -1
///
/// Source: Zheng et al., ICML 2022 (randomized attention).
///
/// @param q, k     [B, H, N, D], [B, Hkv, M, D]  f32 | f16 | bf16, each its own; D in [1, 512]
/// @param indices  [B, H, S, N]     i32 in [-1, M) (checked on the CPU)
/// @param noise    [1 | B, H, S, N, D]  f32; optional, none counts as 0
/// @param w        [B, H, S, N, D]  f32; every element is written; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: no allocation; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void sampled_proposals(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor indices,
                                   ConstTensor noise, double noise_std, Tensor w);

/// Its gradient with the indices fixed, and the score-function term of the draw of the indices.
///
///   dq_n = sum_s (dw_sn + s c_sn k_{i(s,n)}),   dk_m = sum_{s,n: i(s,n) = m} (dw_sn + s c_sn q_n)
///
/// where c = score[b,h,s,n] is the cotangent of the logarithm of the drawn key's unnormalised weight, s <q_n, k_i>.
///
/// @param dw      [B, H, S, N, D]  f32
/// @param score   [B, H, S, N]     f32; optional
/// @param scale   s > 0, used with score; 0 stands for D^-1/2
/// @param dq, dk  like q and k, in f32 | f16 | bf16; every element is written; must not overlap the inputs
/// Promises: O(M + S N) time; sums in f32 in the order of (h, s, n); deterministic.
SUBQUAD_API void sampled_proposals_bwd(const Queue& queue, ConstTensor dw, ConstTensor score, ConstTensor q,
                                       ConstTensor k, ConstTensor indices, double scale, Tensor dq, Tensor dk,
                                       Workspace workspace);
SUBQUAD_API int64_t sampled_proposals_bwd_workspace_bytes(const Queue& queue, ConstTensor dw, ConstTensor score,
                                                          ConstTensor q, ConstTensor k, ConstTensor indices,
                                                          double scale, Tensor dq, Tensor dk);

}  // namespace subquad
