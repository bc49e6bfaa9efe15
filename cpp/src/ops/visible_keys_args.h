/// Arguments of the visible_keys kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct VisibleKeysArgs {
  int64_t batch, seq_q, seq_k;
  bool is_causal;
  Operand key_mask;    // [B, M] bool, optional
  Operand query_mask;  // [B, N] bool, optional
  Operand counts;      // [B, N] i32
  Operand positions;   // [B, M] i32, optional
};

}  // namespace subquad
