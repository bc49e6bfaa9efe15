/// Arguments of the merge_states kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct MergeStatesArgs {
  int64_t batch, heads, seq, dim;
  Operand out1, lse1, out2, lse2;      // [B, H, N, E] f32 | f16 | bf16, [B, H, N] f32
  Operand out, lse;                    // forward: likewise
  Operand dout, dlse;                  // backward: likewise; dlse optional
  Operand dout1, dlse1, dout2, dlse2;  // backward: likewise
};

}  // namespace subquad
