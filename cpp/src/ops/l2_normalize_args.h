/// Arguments of the l2_normalize kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct L2NormalizeArgs {
  int64_t batch, heads, seq, dim;
  Operand x;  // forward: [B, H, N, D]          f32 | f16 | bf16
  Operand y;  // [B, H, N, D]                   f32 | f16 | bf16; written by the forward pass, read by the backward pass
  Operand lse;  // [B, H, N]                      f32; written by the forward pass if given, read by the backward pass
  Operand dy;   // backward: [B, H, N, D]         f32 | f16 | bf16
  Operand dx;   // backward: [B, H, N, D]         f32 | f16 | bf16
};

}  // namespace subquad
