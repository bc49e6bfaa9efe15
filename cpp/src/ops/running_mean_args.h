/// Arguments of the running_mean kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct RunningMeanArgs {
  int64_t batch, heads, seq_q, seq_k, dim;
  Operand v;                   // forward: [B, H, M, E]  f32 | f16 | bf16
  Operand key_mask;            // [B, M] bool, optional
  Operand sum, count;          // [B, H, E] f32, [B] i32, optional
  Operand out;                 // forward: [B, H, N, E]  f32 | f16 | bf16
  Operand new_sum, new_count;  // forward: like sum and count, optional
  Operand dout;                // backward: [B, H, N, E] f32 | f16 | bf16
  Operand base;                // backward: [B, H, M, E] f32 | f16 | bf16, optional
  Operand dv;                  // backward: [B, H, M, E] f32 | f16 | bf16
};

}  // namespace subquad
