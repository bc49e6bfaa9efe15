/// Arguments of the orthogonal_projection kernel: it turns drawn numbers into rows.
#pragma once
#include "core/operand.h"
#include "subquad/options.h"

namespace subquad {

struct OrthogonalProjectionArgs {
  int64_t heads, num_features, dim;
  int64_t blocks;  // ceil(F / D), or ceil(F / D2) for hadamard
  ProjectionKind kind;
  Operand normals;  // [H, blocks * D, D]      f32, contiguous; null for hadamard
  Operand signs;    // [H, 3 * blocks, D2]     f32, contiguous; hadamard only
  Operand lengths;  // [H, F, D]               f32, contiguous: normal vectors whose lengths the rows get
  Operand out;      // [H, F, D]               f32
};

}  // namespace subquad
