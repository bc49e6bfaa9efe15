/// Attention with a kernel that factors: bidirectional, causal by chunks, gated, with a state for decoding.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// What a causal pass leaves behind, so that the next one goes on as if both were one.
///
///   true S = S_i e^{shift_i},   true z likewise
struct LinearAttentionState {
  Tensor s;      ///< [B, Hkv, F, E] f32
  Tensor z;      ///< [B, Hkv, F]    f32
  Tensor shift;  ///< [B, Hkv, F]    f32; with log_features or key_log_weight, else undefined; -inf before any key
};

struct LinearAttentionOptions {
  bool log_features = false;   ///< fq and fk are logarithms of any size up to 2e4; out is stabilised exactly
  ConstTensor key_log_weight;  ///< [B, Hkv, M] f32: multiplies phi(k_m) by e^weight, stabilised; not with log_features
  ConstTensor key_mask;        ///< [B, M] bool, True = keep; a masked key is passed over, its gate and decay too
  bool is_causal = false;      ///< query n sees keys m <= n + (M - N)
  bool normalize = true;       ///< divide by the sum of weights; false is not for log_features or key_log_weight
  ConstTensor gate;            ///< [B, Hkv, M] f32 in [0, 1]: S <- g_m S + (1 - g_m) phi(k_m) v_m; causal only
  /// [B, Hkv, M] f32 in [0, 1]: S <- d_m S + phi(k_m) v_m; causal only; not together with gate. A constant per head is
  /// a view with strides of 0.
  ConstTensor decay;
};

/// Linear attention.
///
///   S_t = sum_{m <= t} c_tm phi(k_m) v_m^T,   z_t = sum_{m <= t} c_tm phi(k_m)
///   out_n = (phi(q_n)^T S_t) / (phi(q_n)^T z_t)
///
/// with t = n + (M - N) (causal) or M - 1, and c_tm the product of the gates or decays behind m, times 1 - g_m if
/// gated. Without normalize out_n = phi(q_n)^T S_t. A query that sees no key, or whose sum of weights is 0, gives 0.
/// Source: Katharopoulos et al., ICML 2020; gates: Peng et al., ICLR 2021; decay: Qin et al. 2024 (Lightning
/// Attention-2). The stabiliser of log features is ours: integral powers of two, so that a later key changes no bit of
/// an earlier row.
///
/// @param fq, fk  [B, H, N, F], [B, Hkv, M, F]  f32 | f16 | bf16; F in [1, 8192]
/// @param v       [B, Hkv, M, E]                f32 | f16 | bf16; E in [1, 512]
/// @param state   in: what came before the first key (causal only); undefined members: nothing
/// @param out     [B, H, N, E]  f32 | f16 | bf16; every element is written; must not overlap the inputs
/// @param new_state  the state behind the last key; optional (causal only); may be `state` itself
/// @throws std::invalid_argument or TypeMismatch if a line above is violated, or a gate or decay is outside [0, 1]
///         (checked on the CPU); Unsupported if no kernel fits.
///
/// Promises: O((N + M) F E) time; no N x M array; sums and states in f32; a call cut in two with the state handed on
/// gives what one call gives, up to rounding; deterministic, the same bits for any number of threads; asynchronous on a
/// CUDA queue.
SUBQUAD_API void linear_attention(const Queue& queue, ConstTensor fq, ConstTensor fk, ConstTensor v,
                                  const LinearAttentionOptions& options, const LinearAttentionState& state, Tensor out,
                                  const LinearAttentionState& new_state, Workspace workspace);
SUBQUAD_API int64_t linear_attention_workspace_bytes(const Queue& queue, ConstTensor fq, ConstTensor fk, ConstTensor v,
                                                     const LinearAttentionOptions& options,
                                                     const LinearAttentionState& state, Tensor out,
                                                     const LinearAttentionState& new_state);

/// Results of the backward pass; dgate is also the gradient of decay; optional are dkey_log_weight and dgate.
struct LinearAttentionGradients {
  Tensor dfq, dfk, dv;     ///< like fq (with log_features: of the logarithms), fk, v, in f32 | f16 | bf16
  Tensor dkey_log_weight;  ///< [B, Hkv, M] f32
  Tensor dgate;            ///< [B, Hkv, M] f32
};

/// Its gradient for the cotangent dout [B, H, N, E] of out. The state that came in is a constant, and the state that
/// goes out takes no part. Deterministic.
SUBQUAD_API void linear_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor fq, ConstTensor fk,
                                      ConstTensor v, const LinearAttentionOptions& options,
                                      const LinearAttentionState& state, const LinearAttentionGradients& gradients,
                                      Workspace workspace);
SUBQUAD_API int64_t linear_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor fq,
                                                         ConstTensor fk, ConstTensor v,
                                                         const LinearAttentionOptions& options,
                                                         const LinearAttentionState& state,
                                                         const LinearAttentionGradients& gradients);

}  // namespace subquad
