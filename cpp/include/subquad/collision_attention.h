/// Attention weighted by the collision probability of a random hyperplane code: YOSO in expectation.
#pragma once
#include "subquad/bucket_gradient.h"
#include "subquad/tensor.h"

namespace subquad {

struct CollisionAttentionOptions {
  int64_t hash_bits = 0;   ///< tau, 1 to 24
  bool is_causal = false;  ///< query n sees keys m <= n + (M - N)
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  ConstTensor query_mask;  ///< [B, N] bool, True = keep; optional. A masked query gives 0.
};

/// The dense sum that bucket_attention samples.
///
///   out[b,h,n,:] = sum_m u(x)^tau v[b,g,m,:],   x = <q_n, k_m> / (|q_n| |k_m|),   u(x) = 1 - acos(x) / pi
///
/// with g = h / (H / Hkv); x is clipped to [-1, 1], and is 0 if q_n or k_m is a zero row.
/// Source: Zeng et al., ICML 2021, equation 4; clipping and masks are ours.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   f32 | f16 | bf16, one dtype; D, E in [1, 512]
/// @param out      [B, H, N, E]   f32 | f16 | bf16; every element is written; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512; on CUDA: above 256).
///
/// Promises: O(N M) time, O(N + M) memory; the same bits for any number of threads; products and sums in f32 (the AMX
/// row multiplies bf16 weights with bf16 values; on a CUDA queue tensor cores multiply, bf16 as it is, f16 as two and
/// f32 as three parts of bf16, weights alike); |error of u| < 2e-7; asynchronous on a CUDA queue.
SUBQUAD_API void collision_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                     const CollisionAttentionOptions& options, Tensor out, Workspace workspace);
SUBQUAD_API int64_t collision_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                        const CollisionAttentionOptions& options, Tensor out);

/// Its gradient for raw q, k and v, in the form that stays bounded when q_n and k_m are parallel.
///
///   dv_m = sum_n p_nm dout_n;   dqhat_n = sum_m <dout_n, v_m> (dp/dx)(x_nm) khat_m, through the normalisation:
///   exact:       dq_n = (1 / |q_n|) sum_m <dout_n, v_m> (tau / pi) u^(tau-1) t_nm,   t_nm = (khat_m - x qhat_n) /
///   sqrt(1 - x^2) lower_bound: dq_n = (1 / |q_n|) (I - qhat qhat^T) sum_m <dout_n, v_m> (tau / 2) u^tau khat_m
///   dk likewise. t is a unit vector; it is taken as 0 where 1 - x^2 rounds to less than 1e-8. Zero rows get gradient
/// 0.
///
/// @param dout        [B, H, N, E]  f32 | f16 | bf16
/// @param dq, dk, dv  like q, k, v; dv is optional
/// Otherwise as collision_attention.
SUBQUAD_API void collision_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                         ConstTensor v, const CollisionAttentionOptions& options, GradientRule rule,
                                         Tensor dq, Tensor dk, Tensor dv, Workspace workspace);
SUBQUAD_API int64_t collision_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q,
                                                            ConstTensor k, ConstTensor v,
                                                            const CollisionAttentionOptions& options, GradientRule rule,
                                                            Tensor dq, Tensor dk, Tensor dv);

}  // namespace subquad
