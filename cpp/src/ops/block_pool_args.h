/// Arguments of the block_pool kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct BlockPoolArgs {
  int64_t batch, heads, seq_q, seq_k, dim, columns;
  Operand v;                     // [B, H, M, E] f32 | f16 | bf16
  Operand probs;                 // [B, H, N, K] f32
  Operand key_mask, query_mask;  // [B, M], [B, N] bool, optional
  Operand out;                   // forward: [B, H, 1, E] f32 | f16 | bf16
  Operand dout;                  // backward: [B, H, 1, E] f32 | f16 | bf16
  Operand base;                  // backward: [B, H, M, E] f32 | f16 | bf16, optional
  Operand dv;                    // backward: [B, H, M, E] f32 | f16 | bf16
  Operand dprobs;                // backward: [B, H, N, K] f32
};

}  // namespace subquad
