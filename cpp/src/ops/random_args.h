/// Arguments of the random kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

enum class Distribution : uint8_t { uniform, normal, sign };

struct RandomArgs {
  int64_t leading, rows, cols;  // the array [..., H, N, D] as [leading, N, D]
  Distribution distribution;
  uint32_t stream;
  uint64_t seed;
  const int64_t* seed_ptr;  // read instead of `seed` when not null
  Operand out;              // [leading, rows, cols]   f32
};

}  // namespace subquad
