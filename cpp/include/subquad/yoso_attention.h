/// YOSO: Bernoulli sampling attention by locality-sensitive hashing.
#pragma once
#include "subquad/collision_attention.h"
#include "subquad/lsh_hash.h"
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

enum class Hashing : uint8_t { hadamard, gaussian };

/// How the gradient for q and k is formed. `automatic`: sampled when sampling, exact in expectation.
/// sampled: bucket_gradient with the lower-bound rule; sampled_exact: with the exact rule; lower_bound and exact:
/// dense, collision_attention_bwd. In expectation mode only the dense two exist.
enum class YosoGradient : uint8_t { automatic, sampled, sampled_exact, lower_bound, exact };

struct YosoOptions {
  int64_t num_hashes = 32;  ///< m, 1 to 65536
  int64_t hash_bits = 8;    ///< tau, 1 to 24
  Hashing hashing = Hashing::hadamard;
  Carving carving = Carving::strided;
  bool expectation = false;  ///< YOSO-E: the dense expectation instead of samples
  bool is_causal = false;    ///< query n sees keys m <= n + (M - N)
  bool normalize = true;     ///< n-YOSO: every output row divided by its l2 norm; a zero row stays zero
  Seed seed;
  YosoGradient gradient = YosoGradient::automatic;
  ConstTensor planes;      ///< [Hp, m, tau, D] f32, Hp 1 or Hkv: explicit Gaussian hashing; optional
  ConstTensor signs;       ///< [Hp, 3, P, D2] f32 of +-1: explicit Hadamard hashing; optional
  ConstTensor key_mask;    ///< [B, M] bool, True = keep; optional
  ConstTensor query_mask;  ///< [B, N] bool, True = keep; optional
};

/// Sampled (linear cost) or expected (dense) YOSO attention.
///
///   X[b,h,n,:] = (1 / m) sum_{r < m} sum_j [ code_r(q_n) == code_r(k_j) ] v_j      or      sum_j u(x_nj)^tau v_j
///   out = X / |X|   (normalize)   or   X
///
/// Source: Zeng et al., ICML 2021. We differ on purpose: carving (lsh_hash.h), clipping, masks, every tail token
/// counts. The un-normalised sum is unbiased over the draw for the expectation (Gaussian hashing exactly, Hadamard
/// hashing nearly; two zero rows always collide); the normalised output is a consistent estimate only. Planes are drawn
/// per key head, shared over the batch: random_normal [Hkv, m * tau, D] of stream 1, or random_signs [Hkv, 3 * P, D2]
/// of stream 2.
///
/// @param q, k, v  [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]   f32 | f16 | bf16, one dtype; D, E in [1, 512]
/// @param out      [B, H, N, E]   like q; must not overlap the inputs
/// @param lse      [B, H, N]      f32: ln |X|, -inf for a zero row; optional, needs `normalize`
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512; on CUDA: above 256).
///
/// Promises: sampled cost O((N + M) m (tau + E)), memory O(N + M); the same bits for any number of threads; an item
/// alone equals the item in a batch; asynchronous on a CUDA queue.
SUBQUAD_API void yoso_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                const YosoOptions& options, Tensor out, Tensor lse, Workspace workspace);
SUBQUAD_API int64_t yoso_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                   const YosoOptions& options, Tensor out, Tensor lse);

/// Gradients for q, k and v. The gradient for v is exact for the sum that the forward pass formed; those for q and k
/// are as `options.gradient` says. With `normalize` dout is first pulled back through the division by |X|; a zero row
/// passes none.
///
/// @param dout        [B, H, N, E]  like q
/// @param out, lse    what the forward pass returned; optional: without both of them its sum is formed again
/// @param dq, dk, dv  like q, k, v; every element is written
SUBQUAD_API void yoso_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                                    const YosoOptions& options, ConstTensor out, ConstTensor lse, Tensor dq, Tensor dk,
                                    Tensor dv, Workspace workspace);
SUBQUAD_API int64_t yoso_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q,
                                                       ConstTensor k, ConstTensor v, const YosoOptions& options,
                                                       ConstTensor out, ConstTensor lse, Tensor dq, Tensor dk,
                                                       Tensor dv);

}  // namespace subquad
