/// Arguments of the topk_select kernels.
#pragma once
#include "core/operand.h"
#include "subquad/options.h"

namespace subquad {

struct TopkSelectArgs {
  int64_t batch, heads, seq_q, seq_k, k;
  Group group;
  bool is_causal;
  Operand key_mask;  // [B, M] bool, optional
  Operand scores;    // [B, H, N, M] f32 | f16 | bf16
  Operand indices;   // [B, H, N, k], [B, N, k], [B, H, k] or [B, k] i32, by the group
};

}  // namespace subquad
