/// One vector per head: the values weighted by how much attention their columns get on average.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Pooled context of bidirectional SEA. With T kept queries, n valid keys of item b and K columns:
///
///   i_c = (1 / T) sum over kept n' of probs[b,h,n',c]
///   out[b,h,0,:] = sum over r < n of i_{col(r)} v[b,h,key of rank r,:]
///
/// col(r) = floor(((2 r + 1) K - 1) / (2 n)). Not normalised: the weights sum to about n / K. Without a kept query or a
/// valid key: 0. Source: Lee et al., ICLR 2024 (SEA), published code; T counts the kept queries, so that padding
/// changes nothing.
///
/// @param v           [B, H, M, E]  f32 | f16 | bf16; E in [1, 512]
/// @param probs       [B, H, N, K]  f32; K at least 1
/// @param key_mask    [B, M]        bool, True = keep; optional. A masked value has no effect, not even with NaN in it.
/// @param query_mask  [B, N]        bool, True = keep; optional; likewise
/// @param out         [B, H, 1, E]  f32 | f16 | bf16; must not overlap the inputs
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N K + M E) time; sums in f32; deterministic, the same bits for any number of threads; asynchronous on a
/// CUDA queue.
SUBQUAD_API void block_pool(const Queue& queue, ConstTensor v, ConstTensor probs, ConstTensor key_mask,
                            ConstTensor query_mask, Tensor out, Workspace workspace);
SUBQUAD_API int64_t block_pool_workspace_bytes(const Queue& queue, ConstTensor v, ConstTensor probs,
                                               ConstTensor key_mask, ConstTensor query_mask, Tensor out);

/// Its gradient for the cotangent dout [B, H, 1, E].
///
///   dv of the key of rank r = i_{col(r)} dout
///   dprobs[b,h,n',c] = (1 / T) sum over the keys of column c of <dout, v>,   0 for a masked query
///
/// @param base    [B, H, M, E]  f32 | f16 | bf16, added to dv before it is rounded; optional
/// @param dv      [B, H, M, E]  f32 | f16 | bf16
/// @param dprobs  [B, H, N, K]  f32; neither may overlap the other arrays
SUBQUAD_API void block_pool_bwd(const Queue& queue, ConstTensor dout, ConstTensor base, ConstTensor v,
                                ConstTensor probs, ConstTensor key_mask, ConstTensor query_mask, Tensor dv,
                                Tensor dprobs, Workspace workspace);
SUBQUAD_API int64_t block_pool_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor base,
                                                   ConstTensor v, ConstTensor probs, ConstTensor key_mask,
                                                   ConstTensor query_mask, Tensor dv, Tensor dprobs);

}  // namespace subquad
