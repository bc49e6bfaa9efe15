/// LARA: linear randomized attention, a few shared proposals in place of one per query.
#pragma once
#include "subquad/options.h"
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

struct LaraOptions {
  int64_t num_landmarks = 49;  ///< C = min(num_landmarks, N, M) by default; given landmarks determine it
  /// [B, H, C, D] and [B, Hkv, C, D], both or neither: f32 or the dtype of q. Default: segment means over the valid
  /// tokens; a segment without one has no landmark.
  ConstTensor q_bar, k_bar;
  Mis mis = Mis::opt;
  double alpha_coeff = 1;  ///< with opt; finite
  /// With opt: t is a softmax over the queries (published), else over the landmarks, which makes rows independent.
  bool t_over_queries = true;
  int64_t samples_per_landmark = 1;  ///< R, J = R C; given noise determines it
  bool antithetic = false;           ///< the second half of the samples takes the negated noise of the first; R even
  ConstTensor noise;     ///< [B, H, J, D] f32, standard normal, sample j owned by landmark j mod C; optional
  double noise_std = 0;  ///< > 0; 0 stands for s^-1/2, which makes the estimate consistent; published codes use 1
  /// Without noise: draw it (stream 7, [H, J, D], shared by the batch); else there is none, and one sample per
  /// landmark.
  bool draw = false;
  Seed seed;
  double scale = 0;      ///< s > 0; 0 stands for D^-1/2
  ConstTensor key_mask;  ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  /// [B, N] bool, True = keep; optional. A masked query gives 0 and takes no part in landmarks or statistics.
  ConstTensor query_mask;
};

/// LARA.
///
///   mu_c = q_bar_c + k_bar_c,   w_j = mu_c(j) + noise_std eps_j,   c(j) = j mod C
///   h_j = sum_m softmax_m(s <w_j, k_m> - s |k_m|^2 / 2) v_m with log-sum-exp L_j
///   out_n = sum_j softmax_j(ln alpha_nj + s <w_j, q_n> + L_j - log_density_j) h_j
///
/// alpha and densities as in mixture_proposals and mixture_weights. A self-normalised multiple importance sampling
/// estimate of softmax attention: biased at any finite J; with exact noise it converges as R grows for opt and bh, not
/// for biased. Rows lie in the convex hull of the values. Not causal: no causal form of it is known.
/// Source: Zheng et al., ICML 2022; masks, cross attention and grouped heads are ours.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   f32 | f16 | bf16, one dtype; D, E in [1, 512]
/// @param out      [B, H, N, E]   the dtype of q; every element is written; must not overlap the inputs
/// @param lse      [B, H, N]      f32, of the last softmax; optional
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O((N + M) J (D + E)) time; memory O((N + M) D + N J), no N x M array; the same bits for any number of
/// threads; asynchronous on a CUDA queue.
SUBQUAD_API void lara_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                const LaraOptions& options, Tensor out, Tensor lse, Workspace workspace);
SUBQUAD_API int64_t lara_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                   const LaraOptions& options, Tensor out, Tensor lse);

/// dq, dk, dv like q, k, v; dq_bar, dk_bar like given landmarks, else undefined: then their gradients flow into dq, dk.
struct LaraGradients {
  Tensor dq, dk, dv, dq_bar, dk_bar;
};

/// Its gradient, through landmarks, samples, weights and densities; noise is a constant.
///
/// @param dout      [B, H, N, E]  the dtype of q
/// @param out, lse  as lara_attention wrote them; optional: without both they are formed again
SUBQUAD_API void lara_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                                    const LaraOptions& options, ConstTensor out, ConstTensor lse,
                                    const LaraGradients& gradients, Workspace workspace);
SUBQUAD_API int64_t lara_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q,
                                                       ConstTensor k, ConstTensor v, const LaraOptions& options,
                                                       ConstTensor out, ConstTensor lse,
                                                       const LaraGradients& gradients);

}  // namespace subquad
