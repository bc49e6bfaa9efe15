/// RA: softmax attention estimated without bias from single samples.
#pragma once
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

/// How gradients for q and k are formed.
enum class RandomizedGradient : int32_t {
  pathwise,  ///< through the samples at fixed keys and noise (published): biased for q and k, exact in mean for v
  unbiased,  ///< and the score-function term of the drawn keys, with exact attention as its baseline: two more dense
             ///< passes
};

struct RandomizedOptions {
  int64_t num_samples = 1;  ///< S, averaged; given indices determine it
  double noise_std = 0;     ///< > 0; 0 stands for s^-1/2, which makes the estimate unbiased; published codes use 1
  ConstTensor indices;      ///< [B, H, S, N] i32, the drawn keys, -1 where a query has none; optional
  ConstTensor noise;        ///< [B, H, S, N, D] f32, standard normal; exactly where indices are
  double scale = 0;         ///< s > 0; 0 stands for D^-1/2
  ConstTensor key_mask;  ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  RandomizedGradient gradient = RandomizedGradient::pathwise;
  Seed seed;  ///< of indices (as softmax_sample) and noise (stream 7, [H * S, N, D])
};

/// Randomized attention.
///
///   m* ~ softmax_m(s <q_n, k_m>),   w = q_n + k_m* + noise_std eps,   eps ~ N(0, I)
///   out_n = (1 / S) sum over S such samples of sum_m softmax_m(s <w, k_m> - s |k_m|^2 / 2) v_m
///
/// E[out] is exactly softmax attention when noise_std = s^-1/2; with any other it is not. Every sample lies in the
/// convex hull of the values. Its variance does not fall with N: relative errors of a single sample are about 1 at unit
/// norms. Quadratic time: it is the yardstick of this family, not a fast method.
/// Source: Zheng et al., ICML 2022; the noise scale is theirs in the text, not in their code.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   f32 | f16 | bf16, one dtype; D, E in [1, 512]
/// @param out      [B, H, N, E]   the dtype of q; every element is written; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated, or an index is outside [-1, M) (checked
///         on the CPU); Unsupported if no kernel fits.
///
/// Promises: O(S N M) time, O(S N + M) memory; the same bits for any number of threads; asynchronous on a CUDA queue.
SUBQUAD_API void randomized_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                      const RandomizedOptions& options, Tensor out, Workspace workspace);
SUBQUAD_API int64_t randomized_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k,
                                                         ConstTensor v, const RandomizedOptions& options, Tensor out);

/// Its gradient for the samples of the forward pass, drawn again or given.
///
/// @param dout        [B, H, N, E]  the dtype of q
/// @param dq, dk, dv  like q, k, v
SUBQUAD_API void randomized_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                          ConstTensor v, const RandomizedOptions& options, Tensor dq, Tensor dk,
                                          Tensor dv, Workspace workspace);
SUBQUAD_API int64_t randomized_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q,
                                                             ConstTensor k, ConstTensor v,
                                                             const RandomizedOptions& options, Tensor dq, Tensor dk,
                                                             Tensor dv);

}  // namespace subquad
