/// Attention over two disjoint sets of keys from the attentions over each.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// The softmax over the union of two sets of keys.
///
///   lse_n = ln(e^{lse1_n} + e^{lse2_n}),   out_n = e^{lse1_n - lse_n} out1_n + e^{lse2_n - lse_n} out2_n
///
/// A part with lse = -inf has no weight, whatever its out holds; two of them give 0 and -inf.
///
/// @param out1, out2  [B, H, N, E]  f32 | f16 | bf16, each its own; E in [1, 512]
/// @param lse1, lse2  [B, H, N]     f32
/// @param out         [B, H, N, E]  f32 | f16 | bf16; must not overlap the inputs
/// @param lse         [B, H, N]     f32; likewise
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: no allocation; f32 arithmetic; deterministic; asynchronous on a CUDA queue.
SUBQUAD_API void merge_states(const Queue& queue, ConstTensor out1, ConstTensor lse1, ConstTensor out2,
                              ConstTensor lse2, Tensor out, Tensor lse);

/// Its gradient. With w_i = e^{lse_i - lse}:
///
///   dout_i = w_i dout,   dlse_i = w_i (<dout, out_i - out> + dlse)
///
/// @param dout, dlse      like out and lse; dlse is optional
/// @param dout1, dlse1, dout2, dlse2  like the inputs, each dout_i in its own dtype; every element is written; must not
///                                    overlap the others
SUBQUAD_API void merge_states_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor out1,
                                  ConstTensor lse1, ConstTensor out2, ConstTensor lse2, Tensor dout1, Tensor dlse1,
                                  Tensor dout2, Tensor dlse2);

}  // namespace subquad
