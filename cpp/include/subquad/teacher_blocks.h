/// What the distillation losses of SEA need of a teacher's attention, without its N x M matrix.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Masses of the teacher's attention per compressed column, and two sums per row.
///
///   P_r = softmax over the visible ranks r of s <q_n, k_r>
///   masses[b,h,n,c] = sum over col(r) = c of P_r,   sum_squares = sum P_r^2,   sum_plogp = sum P_r ln P_r
///
/// col as in expand_values.h. A row that sees no key gives 0. With these a divergence between P and any matrix that is
/// constant over columns is exact: the losses of SEA (Lee et al., ICLR 2024) in O(N K) memory; the sums are ours.
///
/// @param q, k       [B, H, N, D], [B, Hkv, M, D]  f32 | f16 | bf16, one dtype; D in [1, 512]; H a multiple of Hkv
/// @param scale      s > 0; 0 stands for D^-1/2
/// @param visible    [B, N]        i32 in [0, M]: how many keys each row sees, by rank (visible_keys.h)
/// @param positions  [B, M]        i32: the key of each rank, ascending; optional: rank r is key r
/// @param masses     [B, H, N, K]  f32; K in [1, 2^20]
/// @param sum_squares, sum_plogp  [B, H, N]  f32; the outputs must not overlap the inputs or each other
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(N M) time, no N x M array; logits and sums in f32; keys that a row does not see have no effect on it,
/// not even with NaN in them; deterministic, the same bits for any number of threads; asynchronous on a CUDA queue.
SUBQUAD_API void teacher_blocks(const Queue& queue, ConstTensor q, ConstTensor k, double scale, ConstTensor visible,
                                ConstTensor positions, Tensor masses, Tensor sum_squares, Tensor sum_plogp,
                                Workspace workspace);
SUBQUAD_API int64_t teacher_blocks_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, double scale,
                                                   ConstTensor visible, ConstTensor positions, Tensor masses,
                                                   Tensor sum_squares, Tensor sum_plogp);

}  // namespace subquad
