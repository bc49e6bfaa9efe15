/// Arguments of the block_sum kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct BlockSumArgs {
  int64_t batch, heads, seq_q, seq_k, columns;
  Operand x;          // [B, H, N, K] f32
  Operand y;          // [B, H, N, M] f32
  Operand visible;    // [B, N] i32
  Operand positions;  // [B, M] i32, optional
};

}  // namespace subquad
