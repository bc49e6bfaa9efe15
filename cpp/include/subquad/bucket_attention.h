/// Attention by equality of codes: every query adds up the values whose key shares a bucket with it.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

struct BucketAttentionOptions {
  int64_t num_buckets = 0;  ///< codes lie in [0, num_buckets); 1 to 2^24
  double scale = 1.0;       ///< multiplies every sum, typically 1 / num_hashes; finite
  bool is_causal = false;   ///< query n sees keys m <= n + (M - N)
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional. A masked key has no effect, not even with NaN in it.
  ConstTensor query_mask;  ///< [B, N] bool, True = keep; optional. A masked query gives 0.
};

/// Sampled collisions.
///
///   out[b,h,n,:] = scale * sum_r sum_m [ codes_q[b,h,r,n] == codes_k[b,g,r,m] ] v[b,g,m,:],   g = h / (H / Hkv)
///
/// Source: Zeng et al., "You only sample (almost) once", ICML 2021, without its atomics, dropped tails and ignored
/// masks.
///
/// @param codes_q  [B, H, R, N]     u16 | i32
/// @param codes_k  [B, Hkv, R, M]   the same dtype; H a multiple of Hkv
/// @param v        [B, Hkv, M, E]   f32 | f16 | bf16; last axis contiguous; E in [1, 512]
/// @param out      [B, H, N, E]     f32 | f16 | bf16; every element is written; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated, or a code is outside [0, num_buckets)
///         (checked on the CPU, and on CUDA with SUBQUAD_CHECK=1); Unsupported if no kernel fits.
///
/// Promises: O((N + M) R E) time for any distribution of codes, also when all keys share a bucket; scratch memory
/// O((H / Hkv N + M) (R + 64)) per thread whatever num_buckets; the same bits for any number of threads; sums in f32 in
/// token order per bucket, then over hashes. On a CUDA queue: asynchronous; sums in f32 in an order that depends on N,
/// M, num_buckets and is_causal alone; no scratch memory up to N M = 2^18, and tables of up to 1024 buckets beyond that
/// take at most 128 MiB, or what one key head needs.
SUBQUAD_API void bucket_attention(const Queue& queue, ConstTensor codes_q, ConstTensor codes_k, ConstTensor v,
                                  const BucketAttentionOptions& options, Tensor out, Workspace workspace);
SUBQUAD_API int64_t bucket_attention_workspace_bytes(const Queue& queue, ConstTensor codes_q, ConstTensor codes_k,
                                                     ConstTensor v, const BucketAttentionOptions& options, Tensor out);

/// The transposed product, which is the exact gradient of bucket_attention for v.
///
///   dv[b,g,m,:] = scale * sum_{h in group g} sum_r sum_n [ codes_q[b,h,r,n] == codes_k[b,g,r,m] ] dout[b,h,n,:]
///
/// @param dout  [B, H, N, E]     f32 | f16 | bf16
/// @param dv    [B, Hkv, M, E]   f32 | f16 | bf16; a masked key gets 0
/// Otherwise as bucket_attention.
SUBQUAD_API void bucket_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor codes_q, ConstTensor codes_k,
                                      const BucketAttentionOptions& options, Tensor dv, Workspace workspace);
SUBQUAD_API int64_t bucket_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor codes_q,
                                                         ConstTensor codes_k, const BucketAttentionOptions& options,
                                                         Tensor dv);

}  // namespace subquad
