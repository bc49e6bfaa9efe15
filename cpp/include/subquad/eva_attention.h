/// EVA: exact attention inside blocks, one control variate for every chunk outside.
#pragma once
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

struct EvaOptions {
  int64_t window = 64;      ///< length of a block; with partition or is_causal it divides chunk_size or the reverse
  int64_t chunk_size = 64;  ///< length of a chunk
  /// [B, Hkv, C, D], both or neither: f32 or the dtype of q, C = ceil(M / chunk_size). Default: both are the means of
  /// the chunk's valid keys.
  ConstTensor k_bar, mu;
  ConstTensor noise;  ///< [B, Hkv, C, D] f32, standard normal: w_c = mu_c + s^-1/2 noise_c; optional
  bool draw = false;  ///< without noise: draw it (stream 7, [Hkv, C, D], shared by the batch); else w_c = mu_c
  Seed seed;
  bool partition = true;   ///< leave out the chunks that overlap the query's block, whose keys it sees exactly
  bool chunk_mass = true;  ///< add ln of the chunk's number of valid keys to its logit
  double scale = 0;        ///< s > 0; 0 stands for D^-1/2
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  /// Query n sees keys m <= n + (M - N) of its block, and chunks that end before the block begins (without partition:
  /// before its own chunk begins).
  bool is_causal = false;
};

/// Chunks in condensed form: what a causal call leaves behind for the next one.
struct EvaChunks {
  Tensor k_bar;     ///< [B, Hkv, C, D] f32
  Tensor beta;      ///< [B, Hkv, C, E] f32
  Tensor log_mass;  ///< [B, C]         f32, -inf for a chunk without a valid key
};

/// EVA. With position p = n + (M - N), block p / window and chunks of keys [c chunk_size, (c + 1) chunk_size):
///
///   beta_c = sum over m in chunk c of softmax_m(s <w_c, k_m> - s |k_m|^2 / 2) v_m
///   out_n = softmax over [s <q_n, k_m> for the keys m of the block; s <q_n, k_bar_c> + ln |chunk c| for the visible
///           chunks] of [v_m; beta_c]
///
/// Exact where the block holds every visible key, or every chunk one key. Biased otherwise: a chunk counts as its mean
/// key. Good where keys of a chunk are alike, no better than the mean of the values where they are independent.
/// Source: Zheng et al., ICLR 2023; partition, chunk_mass, masked means and dropped empty chunks are corrections of
/// ours, the first two can be switched off (published).
///
/// A causal call goes on from an earlier one: `past` are the earlier chunks, and k and v begin with the tokens since
/// the last multiple of max(window, chunk_size) (the tail), so that M = tail + N.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   f32 | f16 | bf16, one dtype; D, E in [1, 512]
/// @param past     causal only: chunks before the first key, all of them visible; undefined members: none
/// @param out      [B, H, N, E]   the dtype of q; every element is written; must not overlap the inputs
/// @param lse      [B, H, N]      f32; optional
/// @param chunks   the chunks of k: [B, Hkv, C, .] and [B, C]; optional
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N (window + C)) time per head; no N x M array; the same bits for any number of threads; causal rows do
/// not depend on later tokens in a single bit; asynchronous on a CUDA queue.
SUBQUAD_API void eva_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                               const EvaOptions& options, const EvaChunks& past, Tensor out, Tensor lse,
                               const EvaChunks& chunks, Workspace workspace);
SUBQUAD_API int64_t eva_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                  const EvaOptions& options, const EvaChunks& past, Tensor out,
                                                  Tensor lse, const EvaChunks& chunks);

/// dq, dk, dv like q, k, v; dk_bar, dmu like given landmarks, else undefined: then their gradients flow into dk.
struct EvaGradients {
  Tensor dq, dk, dv, dk_bar, dmu;
};

/// Its gradient, through landmarks and beta; noise and past are constants.
///
/// @param dout      [B, H, N, E]  the dtype of q
/// @param out, lse  as eva_attention wrote them; optional: without both they are formed again
SUBQUAD_API void eva_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                                   const EvaOptions& options, const EvaChunks& past, ConstTensor out, ConstTensor lse,
                                   const EvaGradients& gradients, Workspace workspace);
SUBQUAD_API int64_t eva_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q,
                                                      ConstTensor k, ConstTensor v, const EvaOptions& options,
                                                      const EvaChunks& past, ConstTensor out, ConstTensor lse,
                                                      const EvaGradients& gradients);

}  // namespace subquad
