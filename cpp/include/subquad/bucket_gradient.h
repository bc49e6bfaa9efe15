/// Sampled gradients of collision attention for queries and keys, at linear cost.
#pragma once
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

/// Which derivative of p = u^tau a sampled or dense gradient estimates; u = 1 - acos(x) / pi.
/// exact: dp/dx = tau u^(tau-1) / (pi sqrt(1 - x^2)); lower_bound: the published surrogate (tau / 2) u^tau, which is
/// never above it (9 % below at best).
enum class GradientRule : uint8_t { lower_bound, exact };

struct BucketGradientOptions {
  int64_t hash_bits = 0;  ///< tau; codes lie in [0, 2^tau); 1 to 24
  int64_t num_samples =
      4;  ///< S, 1 to 64: pairs evaluated per (row, hash); with `exact` S more among the flipped codes
  GradientRule rule = GradientRule::lower_bound;
  Seed seed;  ///< of the choice of pairs
  bool is_causal = false;
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional
  ConstTensor query_mask;  ///< [B, N] bool, True = keep; optional
};

/// Unbiased estimates of the dense gradients of X = sum_m u(x_nm)^tau v_m, over the draw of the codes and of the pairs.
///
///   lower_bound: dqhat_n = (tau / 2) (1 / R) sum_r sum_m [codes equal] <dout_n, v_m> khat_m
///   exact:       dqhat_n = (tau / pi) (1 / R) sum_r ( sum_m [codes equal] + (1 / tau) sum_m [codes differ in one bit]
///                          ) <dout_n, v_m> t_nm,      t_nm = (khat_m - x qhat_n) / sqrt(1 - x^2)
///   dq_n = (dqhat_n - qhat_n <qhat_n, dqhat_n>) / |q_n|;  dk likewise with the roles of query and key exchanged
///
/// A sum over more than S candidates is estimated from S of them, taken at even steps from a random start, each
/// weighted by (candidates / S). So the work per (row, hash) is bounded whatever the bucket loads, and a row whose dout
/// is zero gets zero. Source: the lower bound is Zeng et al., ICML 2021, section 3.3; E[exact] follows from
/// u^tau + u^(tau-1) (1 - u) = u^(tau-1), our own.
///
/// @param dout     [B, H, N, E]               f32 | f16 | bf16: the gradient of the un-normalised sum X
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   one dtype
/// @param codes_q  [B, H, R, N], codes_k [B, Hkv, R, M]           u16 | i32, the codes of the forward pass
/// @param dq, dk   like q and k; every element is written; rows that are masked, or zero, get 0
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O((N + M) R S (D + E)) time; the same bits for any number of threads; asynchronous on a CUDA queue.
SUBQUAD_API void bucket_gradient(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                                 ConstTensor codes_q, ConstTensor codes_k, const BucketGradientOptions& options,
                                 Tensor dq, Tensor dk, Workspace workspace);
SUBQUAD_API int64_t bucket_gradient_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                                    ConstTensor v, ConstTensor codes_q, ConstTensor codes_k,
                                                    const BucketGradientOptions& options, Tensor dq, Tensor dk);

}  // namespace subquad
