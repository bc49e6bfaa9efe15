/// Softmax attention over the entries of a sparse pattern.
#pragma once
#include "subquad/sparse_pattern.h"

namespace subquad {

struct SparseAttentionOptions {
  double scale = 0;       ///< s > 0; 0 stands for D^-1/2
  ConstTensor row_scale;  ///< r [B, H, N] f32; optional: 1
  ConstTensor mix;        ///< m [B, H, N] f32; optional: 1
  ConstTensor context;    ///< c [B, H, N | 1, E] f32 or the dtype of out; with mix only; optional: 0
  /// [B, N] bool, True = keep; optional. A masked query gives 0, lse -inf and no gradient.
  ConstTensor query_mask;
  /// Backward pass of a pattern of blocks: at least its number of entries. Scratch memory grows with it.
  int64_t max_entries = 0;
};

/// Sparse attention.
///
///   x_e = s <q_n, k_e> + log_weight_e,   lse_n = ln sum_e e^{x_e},   e over the entries of row (b, h, n)
///   out[b,h,n,:] = m_n r_n sum_e e^{x_e - lse_n} v_e + (1 - m_n) c_n
///
/// with the keys and values of head g = h / (H / Hkv). A row without an entry, or only with entries of weight -inf,
/// gives (1 - m_n) c_n and lse = -inf. The three forms of one matrix give the same result up to rounding.
/// Source: gather attention as in Desai et al. 2024 (vAttention) and others; r, m, c: Lee et al., ICLR 2024 (SEA), 3.3.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]  f32 | f16 | bf16, one dtype; D, E in [1, 512];
///                 H a multiple of Hkv
/// @param out      [B, H, N, E]  of that dtype; every element is written; must not overlap the inputs
/// @param lse      [B, H, N]     f32, natural log, without r, m, c; optional
/// @throws std::invalid_argument or TypeMismatch if a line above is violated, also by the values of the pattern
///         (checked on the CPU: keys in range, order of CSR, sizes of blocks); Unsupported if no kernel fits.
///
/// Promises: time and memory linear in the entries; products and sums in f32; deterministic, the same bits for any
/// number of threads; keys outside a row's pattern have no effect on it, not even with NaN in them; asynchronous on a
/// CUDA queue.
SUBQUAD_API void sparse_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                  const SparsePattern& pattern, const SparseAttentionOptions& options, Tensor out,
                                  Tensor lse, Workspace workspace);
SUBQUAD_API int64_t sparse_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                     const SparsePattern& pattern,
                                                     const SparseAttentionOptions& options, Tensor out, Tensor lse);

/// Results of the backward pass; those left undefined are not formed.
struct SparseAttentionGradients {
  Tensor dq, dk, dv;  ///< like q, k, v, in f32 or their dtype; these three are required
  Tensor drow_scale;  ///< [B, H, N] f32
  Tensor dmix;        ///< [B, H, N] f32
  Tensor dcontext;    ///< like context
};

/// Its gradient for the cotangents of out and of lse. With p_e = e^{x_e - lse_n}, g_e = <dout_n, v_e>, d_n = sum_e p_e
/// g_e:
///
///   dx_e = p_e (m_n r_n (g_e - d_n) + dlse_n),   dq_n = s sum_e dx_e k_e,
///   dk_j = s sum over entries of key j of dx_e q_n,   dv_j = sum over entries of key j of m_n r_n p_e dout_n,
///   drow_scale_n = m_n d_n,
///   dmix_n = r_n d_n - <dout_n, c_n>,   dcontext_n = (1 - m_n) dout_n  (summed over n where context has one row)
///
/// p is formed again from q and k, so that neither out nor lse of the forward pass is needed. The pattern and its
/// weights are constants.
///
/// @param dout  [B, H, N, E]  of the dtype of q
/// @param dlse  [B, H, N]     f32; optional
/// Otherwise as sparse_attention. Deterministic: every key adds up its own entries in the order of the queries.
SUBQUAD_API void sparse_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q,
                                      ConstTensor k, ConstTensor v, const SparsePattern& pattern,
                                      const SparseAttentionOptions& options, const SparseAttentionGradients& gradients,
                                      Workspace workspace);
SUBQUAD_API int64_t sparse_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlse,
                                                         ConstTensor q, ConstTensor k, ConstTensor v,
                                                         const SparsePattern& pattern,
                                                         const SparseAttentionOptions& options,
                                                         const SparseAttentionGradients& gradients);

}  // namespace subquad
