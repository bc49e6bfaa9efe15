/// Arguments of the attention_divergence kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct AttentionDivergenceArgs {
  int64_t batch, heads_q, heads_kv, heads_teacher, seq_q, seq_k, dim, dim_teacher;
  float scale, scale_teacher;
  Operand q, k;                  // [B, H, N, D], [B, Hkv, M, D] f32 | f16 | bf16
  Operand q_teacher, k_teacher;  // [B, H, N, Dt], [B, Ht, M, Dt] f32 | f16 | bf16
  Operand visible;               // [B, N] i32
  Operand positions;             // [B, M] i32, optional
  Operand kl, sse;               // forward: [B, H, N] f32
  Operand dkl, dsse;             // backward: [B, H, N] f32, optional
  Operand dq, dk;                // backward: like q, k
};

}  // namespace subquad
