/// Exact softmax attention in one pass over the keys, with additive biases and a log-sum-exp.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

struct SoftmaxAttentionOptions {
  double scale = 0;          ///< s > 0; 0 stands for D^-1/2
  ConstTensor key_bias;      ///< [B, 1 | Hkv | H, M] f32, -inf allowed; optional
  double key_norm_bias = 0;  ///< c: adds c |k_m|^2, formed in f32 from k as given
  ConstTensor pair_bias;     ///< [B, H, N, M] f32, -inf allowed; optional: the caller's choice of O(N M) memory
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  ConstTensor query_mask;  ///< [B, N] bool, True = keep; optional. A masked query gives 0.
  bool is_causal = false;  ///< query n sees keys m <= n + (M - N)
  int64_t window_left = -1;   ///< query n sees keys m >= n + (M - N) - window_left; -1 = all
  int64_t window_right = -1;  ///< query n sees keys m <= n + (M - N) + window_right; -1 = all
};

/// Softmax attention.
///
///   x_nm = s <q_n, k_m> + c |k_m|^2 + key_bias_m + pair_bias_nm,   lse_n = ln sum_m e^{x_nm},
///   out[b,h,n,:] = sum_m e^{x_nm - lse_n} v[b,g,m,:],   m over the keys that n sees,   g = h / (H / Hkv)
///
/// A query that sees no key, or only keys of bias -inf, gives 0 and lse = -inf.
/// Source: Vaswani et al. 2017; one pass with a running maximum: Milakov and Gimelshein 2018, Dao et al. 2022.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   f32 | f16 | bf16, each its own; D, E in [1, 512].
///                 v may be left out together with out.
/// @param out      [B, H, N, E]   f32 | f16 | bf16; every element is written; must not overlap the inputs; optional if
///                 lse is given
/// @param lse      [B, H, N]      f32, natural log; optional
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512).
///
/// Promises: O(N M) time, O(N + M) memory; the same bits for any number of threads; products, logits and sums in f32
/// (the AMX row multiplies bf16 weights with bf16 values, and counts f32 rows that meet bf16 ones with 16 bits); what a
/// query does not see, NaN included, does not change a bit of its row; asynchronous on a CUDA queue.
SUBQUAD_API void softmax_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                   const SoftmaxAttentionOptions& options, Tensor out, Tensor lse, Workspace workspace);
SUBQUAD_API int64_t softmax_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                      const SoftmaxAttentionOptions& options, Tensor out, Tensor lse);

/// Results of the backward pass; those left undefined are not formed.
struct SoftmaxAttentionGradients {
  Tensor dq, dk, dv;  ///< like q, k, v, in f32 | f16 | bf16
  Tensor dkey_bias;   ///< like key_bias
  Tensor dpair_bias;  ///< [B, H, N, M] f32
};

/// Its gradient, for cotangents of out and of lse.
///
///   p_nm = e^{x_nm - lse_n},   dx_nm = p_nm (<dout_n, v_m> - <dout_n, out_n> + dlse_n),   dv_m = sum_n p_nm dout_n,
///   dq_n = s sum_m dx_nm k_m,   dk_m = s sum_n dx_nm q_n + 2 c k_m sum_n dx_nm,   dkey_bias_m = sum_n dx_nm
///
/// @param dout     [B, H, N, E]  f32 | f16 | bf16; optional if dlse is given
/// @param dlse     [B, H, N]     f32; optional if dout is given
/// @param out, lse as softmax_attention wrote them; formed again if one of them is needed and left out
/// Otherwise as softmax_attention; deterministic.
SUBQUAD_API void softmax_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q,
                                       ConstTensor k, ConstTensor v, const SoftmaxAttentionOptions& options,
                                       ConstTensor out, ConstTensor lse, const SoftmaxAttentionGradients& gradients,
                                       Workspace workspace);
SUBQUAD_API int64_t softmax_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlse,
                                                          ConstTensor q, ConstTensor k, ConstTensor v,
                                                          const SoftmaxAttentionOptions& options, ConstTensor out,
                                                          ConstTensor lse, const SoftmaxAttentionGradients& gradients);

}  // namespace subquad
