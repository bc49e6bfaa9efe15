/// SEA: sparse attention where an estimate of the attention matrix says that it matters.
#pragma once
#include "subquad/select_blocks.h"
#include "subquad/tensor.h"

namespace subquad {

struct SeaAttentionOptions {
  SelectBlocksOptions select;  ///< top_k, group, budget, skip_dead; the groups head and batch are not for is_causal
  int64_t block_cap = 0;       ///< at most so many keys, the newest, of a selected column; 0 stands for ceil(top_k)
  double scale = 0;            ///< s > 0; 0 stands for D^-1/2
  ConstTensor row_scale;       ///< r [B, H, N] f32; optional: 1
  ConstTensor mix;             ///< m [B, H, N] f32; optional: 1, and no context
  /// c [B, H, N | 1, E] f32 or the dtype of q, with mix only; default with mix: the running mean of v (causal) or its pool
  /// over the columns (block_pool.h).
  ConstTensor context;
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  ConstTensor query_mask;  ///< [B, N] bool, True = keep; optional. A masked query gives 0.
  bool is_causal = false;  ///< query n sees keys m <= n + (M - N)
};

/// What was attended to, as members of a pattern of blocks (sparse_pattern.h) with K columns and block_cap.
struct SeaPattern {
  Tensor bits;       ///< [B, H, N, ceil(K / 8)] u8
  Tensor visible;    ///< [B, N] i32
  Tensor positions;  ///< [B, M] i32; with key_mask only
};

/// SEA. The columns of probs that are selected (select_blocks.h) stand for blocks of each row's visible keys:
///
///   out[b,h,n,:] = m_n r_n sum_e softmax_e(s <q_n, k_e>) v_e + (1 - m_n) c_n,   e over the selected keys
///
/// With k as large as the number of keys the sparse part is exact attention. Biased otherwise: what is not selected is
/// missing, and only the context stands for it. The selection is a constant of the backward pass: probs has a gradient
/// through the pooled context alone, and is trained by losses of its own (teacher_blocks.h).
/// Source: Lee et al., ICLR 2024 (SEA). A row counts the valid keys that it sees, so that padding changes nothing, and
/// a column keeps its newest keys (the published code takes every other one when it computes, and all when it trains).
///
/// @param q, k, v  [B, H, N, D], [B, H, M, D], [B, H, M, E]  f32 | f16 | bf16, one dtype; D, E in [1, 512]
/// @param probs    [B, H, N, K]  f32
/// @param out      [B, H, N, E]  the dtype of q; every element is written; must not overlap the inputs
/// @param lse      [B, H, N]     f32, over the selected keys; optional
/// @param pattern  optional: none or all of its members; every element is written; must not overlap the others
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O((N + M) (k + K)) time and O(N + M) memory per head; the same bits for any number of threads; causal rows
/// do not depend on later tokens in a single bit; asynchronous on a CUDA queue.
SUBQUAD_API void sea_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, ConstTensor probs,
                               const SeaAttentionOptions& options, Tensor out, Tensor lse, const SeaPattern& pattern,
                               Workspace workspace);
SUBQUAD_API int64_t sea_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                  ConstTensor probs, const SeaAttentionOptions& options, Tensor out,
                                                  Tensor lse, const SeaPattern& pattern);

/// dq, dk, dv like q, k, v; drow_scale, dmix, dcontext like row_scale, mix, context where these are given, else
/// undefined; dprobs [B, H, N, K] f32 with the pooled context, which alone passes a gradient to probs, else undefined.
struct SeaAttentionGradients {
  Tensor dq, dk, dv, dprobs, drow_scale, dmix, dcontext;
};

/// Its gradient. The scratch memory holds the selected entries: at most about H N k of them per item, 24 bytes each.
///
/// @param dout  [B, H, N, E]  the dtype of q
/// @param dlse  [B, H, N]     f32; optional
SUBQUAD_API void sea_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q, ConstTensor k,
                                   ConstTensor v, ConstTensor probs, const SeaAttentionOptions& options,
                                   const SeaAttentionGradients& gradients, Workspace workspace);
SUBQUAD_API int64_t sea_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlse,
                                                      ConstTensor q, ConstTensor k, ConstTensor v, ConstTensor probs,
                                                      const SeaAttentionOptions& options,
                                                      const SeaAttentionGradients& gradients);

}  // namespace subquad
