/// Arguments of the sum_arrays kernel.
#pragma once
#include "core/operand.h"

namespace subquad {

struct SumArraysTerm {
  Operand array;         // [B_i, H_i, N, D]  f32 | f16 | bf16
  int64_t items, group;  // b' and h' that fall on one b and h
  float factor;
};

struct SumArraysArgs {
  int64_t batch, heads, seq, dim;
  int32_t num_terms;
  SumArraysTerm terms[4];
  Operand out;  // [B, H, N, D]  f32 | f16 | bf16
};

}  // namespace subquad
