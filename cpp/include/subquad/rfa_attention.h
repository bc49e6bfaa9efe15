/// RFA: softmax attention estimated, or replaced, by random features, in time linear in the length.
#pragma once
#include "subquad/linear_attention.h"
#include "subquad/options.h"
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

struct RfaOptions {
  Features features = Features::positive;
  int64_t num_features = 256;  ///< F, rows of the drawn projection; a given projection determines it. None for elu.
  ConstTensor projection;      ///< [F, D] or [Hkv, F, D] f32, rows ~ N(0, I); optional
  bool orthogonal = true;      ///< draw orthogonal rows (Haar), else independent ones
  double scale = 0;            ///< s > 0; 0 stands for D^-1/2
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  bool is_causal = false;  ///< query n sees keys m <= n + (M - N)
  ConstTensor gate;        ///< [B, Hkv, M] f32 in [0, 1], causal only: S <- g S + (1 - g) phi(k) v; optional
  Seed seed;               ///< of the projection
};

/// Random feature attention.
///
///   out_n = sum_m <phi(q_n), phi(k_m)> v_m / sum_m <phi(q_n), phi(k_m)>
///
/// with phi as in feature_map. Positive and hyperbolic features are evaluated as two softmax attentions, which needs no
/// epsilon and stays finite for any norms:
///
///   h_i = sum_m softmax_m(<w_i, k~_m> - |k~_m|^2 / 2) v_m with log-sum-exp L_i
///   out_n = sum_i softmax_i(<w_i, q~_n> + L_i) h_i
///
/// causal and gated ones by linear_attention on logarithms of features. Source: Choromanski et al., ICLR 2021; Peng et
/// al., ICLR 2021 (trig, gates). Bias O(1 / F), for out is a ratio of unbiased estimates; the variance grows as
/// e^{|q~ + k~|^2}, so that rows of large norm need more features than are worth it. The denominator of trig features
/// may be near 0 or negative, and their rows then far from any average of values.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   f32 | f16 | bf16, one dtype; D, E in [1, 512]
/// @param state, new_state  causal only, as in linear_attention; F' = feature_dim(features, F, D). The projection must
///                 be that of the earlier call.
/// @param out      [B, H, N, E]   the dtype of q; every element is written; must not overlap the inputs
/// @param lse      [B, H, N]      f32: ln sum_i e^{<w_i, q~_n> + L_i}; optional; positive and hyperbolic features, not
///                 causal
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O((N + M) F (D + E)) time; no N x M array; the same bits for any number of threads; causal rows do not
/// depend on later tokens in a single bit; asynchronous on a CUDA queue.
SUBQUAD_API void rfa_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                               const RfaOptions& options, const LinearAttentionState& state, Tensor out, Tensor lse,
                               const LinearAttentionState& new_state, Workspace workspace);
SUBQUAD_API int64_t rfa_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                  const RfaOptions& options, const LinearAttentionState& state,
                                                  Tensor out, Tensor lse, const LinearAttentionState& new_state);

/// dq, dk, dv like q, k, v; dprojection like the given projection, dgate [B, Hkv, M] f32: optional.
struct RfaGradients {
  Tensor dq, dk, dv, dprojection, dgate;
};

/// Its gradient for the projection as drawn or given; the state is a constant.
///
/// @param dout      [B, H, N, E]  the dtype of q
/// @param out, lse  as rfa_attention wrote them (with lse); optional: without both they are formed again
SUBQUAD_API void rfa_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                                   const RfaOptions& options, const LinearAttentionState& state, ConstTensor out,
                                   ConstTensor lse, const RfaGradients& gradients, Workspace workspace);
SUBQUAD_API int64_t rfa_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q,
                                                      ConstTensor k, ConstTensor v, const RfaOptions& options,
                                                      const LinearAttentionState& state, ConstTensor out,
                                                      ConstTensor lse, const RfaGradients& gradients);

}  // namespace subquad
