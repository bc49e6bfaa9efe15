/// How far the attention of a student is from that of a teacher, row by row, without either N x M matrix.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

struct AttentionDivergenceOptions {
  double scale = 0;          ///< of the student, above 0; 0 stands for D^-1/2
  double scale_teacher = 0;  ///< of the teacher, above 0; 0 stands for Dt^-1/2
  ConstTensor visible;       ///< [B, N] i32 in [0, M]: how many keys each row sees, in the order of their ranks
  ConstTensor positions;     ///< [B, M] i32: the key of each rank, ascending; optional: rank r is key r
};

/// Kullback-Leibler divergence and squared distance of two softmax rows over the same visible keys.
///
///   S_r = softmax_r(scale <q_n, k_r>),   T_r = softmax_r(scale_teacher <qt_n, kt_r>)
///   kl[b,h,n] = sum_r T_r ln(T_r / S_r),   sse[b,h,n] = sum_r (S_r - T_r)^2
///
/// A row that sees no key gives 0. Used by the distillation of SEA (Lee et al., ICLR 2024).
///
/// @param q, k    [B, H, N, D], [B, Hkv, M, D]     f32 | f16 | bf16, one dtype; D in [1, 512]; H a multiple of Hkv
/// @param q_teacher, k_teacher  [B, H, N, Dt], [B, Ht, M, Dt]  f32 | f16 | bf16, one dtype; Dt in [1, 512]; H a
///                   multiple of Ht
/// @param kl, sse  [B, H, N]  f32; must not overlap the inputs or each other
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N M) time, O(N + M) memory; logits and sums in f32; keys that a row does not see have no effect on it,
/// not even with NaN in them; deterministic, the same bits for any number of threads; asynchronous on a CUDA queue.
SUBQUAD_API void attention_divergence(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor q_teacher,
                                      ConstTensor k_teacher, const AttentionDivergenceOptions& options, Tensor kl,
                                      Tensor sse, Workspace workspace);
SUBQUAD_API int64_t attention_divergence_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k,
                                                         ConstTensor q_teacher, ConstTensor k_teacher,
                                                         const AttentionDivergenceOptions& options, Tensor kl,
                                                         Tensor sse);

/// Its gradient for q and k; the teacher is a constant.
///
///   dx_nr = dkl_n (S_r - T_r) + 2 dsse_n S_r (e_r - sum_j S_j e_j),   e = S - T of row n
///   dq_n = scale sum_r dx_nr k_r,   dk_r = scale sum_n dx_nr q_n
///
/// @param dkl, dsse  [B, H, N]  f32; optional: 0
/// @param dq, dk     like q and k; every element is written; must not overlap the others
SUBQUAD_API void attention_divergence_bwd(const Queue& queue, ConstTensor dkl, ConstTensor dsse, ConstTensor q,
                                          ConstTensor k, ConstTensor q_teacher, ConstTensor k_teacher,
                                          const AttentionDivergenceOptions& options, Tensor dq, Tensor dk,
                                          Workspace workspace);
SUBQUAD_API int64_t attention_divergence_bwd_workspace_bytes(const Queue& queue, ConstTensor dkl, ConstTensor dsse,
                                                             ConstTensor q, ConstTensor k, ConstTensor q_teacher,
                                                             ConstTensor k_teacher,
                                                             const AttentionDivergenceOptions& options, Tensor dq,
                                                             Tensor dk);

}  // namespace subquad
