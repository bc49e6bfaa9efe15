/// Keys drawn with the probabilities of softmax attention, without forming them.
#pragma once
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

struct SoftmaxSampleOptions {
  double scale = 0;         ///< s > 0; 0 stands for D^-1/2
  int64_t num_samples = 1;  ///< S >= 1, drawn independently
  ConstTensor key_mask;     ///< [B, M] bool, True = keep; optional
  Seed seed;
};

/// Draws from the softmax over the keys.
///
///   P(indices[b,h,s,n] = m) = e^{s <q_n, k_m>} / sum_m' e^{s <q_n, k_m'>};   -1 for a query without a key
///
/// One pass over the keys in blocks of 64 by index: with u[n, t] uniform, block t replaces the block chosen before it
/// if u[n, t] W_t < w_t, w_t being the sum of its weights and W_t that of the blocks up to it; a last uniform u[n, T]
/// draws the key from the chosen block by its cumulative weights. u is random_uniform of an array [H * S, N, T + 1], T
/// = ceil(M / 64), on stream 8: it is the same for every item of the batch.
///
/// @param q, k     [B, H, N, D], [B, Hkv, M, D]  f32 | f16 | bf16, each its own; D in [1, 512]
/// @param indices  [B, H, S, N]  i32; every element is written
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(S N M) time, O(N + M) memory; the same for any number of threads; weights in f32, so two backends may
/// differ where a uniform falls within rounding of a boundary; asynchronous on a CUDA queue.
SUBQUAD_API void softmax_sample(const Queue& queue, ConstTensor q, ConstTensor k, const SoftmaxSampleOptions& options,
                                Tensor indices, Workspace workspace);
SUBQUAD_API int64_t softmax_sample_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k,
                                                   const SoftmaxSampleOptions& options, Tensor indices);

}  // namespace subquad
