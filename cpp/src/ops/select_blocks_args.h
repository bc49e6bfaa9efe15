/// Arguments of the select_blocks kernels.
#pragma once
#include "core/operand.h"
#include "subquad/options.h"

namespace subquad {

struct SelectBlocksArgs {
  int64_t batch, heads, seq_q, columns;
  double top_k;
  Group group;
  BudgetRule budget;
  bool skip_dead;
  Operand probs;    // [B, H, N, K] f32
  Operand visible;  // [B, N] i32
  Operand bits;     // [B, H, N, ceil(K / 8)] u8
};

}  // namespace subquad
