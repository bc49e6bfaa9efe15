/// Arguments of the teacher_blocks kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct TeacherBlocksArgs {
  int64_t batch, heads_q, heads_kv, seq_q, seq_k, dim, columns;
  float scale;
  Operand q, k;                    // [B, H, N, D], [B, Hkv, M, D] f32 | f16 | bf16
  Operand visible;                 // [B, N] i32
  Operand positions;               // [B, M] i32, optional
  Operand masses;                  // [B, H, N, K] f32
  Operand sum_squares, sum_plogp;  // [B, H, N] f32
};

}  // namespace subquad
