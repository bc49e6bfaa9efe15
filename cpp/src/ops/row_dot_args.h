/// Arguments of the row_dot kernel.
#pragma once
#include "core/operand.h"

namespace subquad {

struct RowDotArgs {
  int64_t batch, heads, seq, dim;
  Operand x, y, z;  // [B, H, N, D]  f32 | f16 | bf16; z optional
  Operand out;      // [B, H, N]     f32
};

}  // namespace subquad
