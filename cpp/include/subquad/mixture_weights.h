/// The weights with which every query combines the samples of a mixture: the `opt` rule of LARA.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

struct MixtureWeightsOptions {
  double scale = 0;          ///< s > 0; 0 stands for D^-1/2
  double alpha_coeff = 1;    ///< finite
  bool over_queries = true;  ///< t is a softmax over the queries (published), by column_lse; else over landmarks
  ConstTensor query_mask;    ///< [B, N] bool, True = keep; a masked query has t = 0 and a row of -inf; optional
  ConstTensor counts;        ///< [B, C] i32: landmark c exists where counts > 0; optional
};

/// Logarithms of the weights.
///
///   t_nc = e^{s <q_bar_c, q_n> - column_lse_c}, or the softmax over c of s <q_bar_c, q_n>
///   log_alpha_nj = ln max(1e-8, balance_j + alpha_coeff (t_nc(j) - mean_c' t_nc')),   c(j) = j mod C
///
/// with t and its mean over the landmarks that exist; -inf for samples of those that do not.
/// Source: Zheng et al., ICML 2022 (LARA), the optimal weights.
///
/// @param q           [B, H, N, D]  f32 | f16 | bf16; D in [1, 512]
/// @param q_bar       [B, H, C, D]  f32 | f16 | bf16
/// @param column_lse  [B, H, C]     f32: ln sum_n e^{s <q_bar_c, q_n>} over the queries kept; with over_queries only
/// @param balance     [B, H, J]     f32, J a multiple of C
/// @param log_alpha   [B, H, N, J]  f32; every element is written; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N C D + N J) time; f32 arithmetic; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void mixture_weights(const Queue& queue, ConstTensor q, ConstTensor q_bar, ConstTensor column_lse,
                                 ConstTensor balance, const MixtureWeightsOptions& options, Tensor log_alpha,
                                 Workspace workspace);
SUBQUAD_API int64_t mixture_weights_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor q_bar,
                                                    ConstTensor column_lse, ConstTensor balance,
                                                    const MixtureWeightsOptions& options, Tensor log_alpha);

/// Its gradient, through column_lse too (which depends on q and q_bar alone); where the floor of 1e-8 holds it is 0.
///
/// @param dlog_alpha  [B, H, N, J]  f32
/// @param dq          [B, H, N, D]  f32 | f16 | bf16
/// @param dq_bar      [B, H, C, D]  f32
/// @param dbalance    [B, H, J]     f32
SUBQUAD_API void mixture_weights_bwd(const Queue& queue, ConstTensor dlog_alpha, ConstTensor q, ConstTensor q_bar,
                                     ConstTensor column_lse, ConstTensor balance, const MixtureWeightsOptions& options,
                                     Tensor dq, Tensor dq_bar, Tensor dbalance, Workspace workspace);
SUBQUAD_API int64_t mixture_weights_bwd_workspace_bytes(const Queue& queue, ConstTensor dlog_alpha, ConstTensor q,
                                                        ConstTensor q_bar, ConstTensor column_lse, ConstTensor balance,
                                                        const MixtureWeightsOptions& options, Tensor dq, Tensor dq_bar,
                                                        Tensor dbalance);

}  // namespace subquad
