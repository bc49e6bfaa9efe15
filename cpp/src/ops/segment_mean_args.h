/// Arguments of the segment_mean kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct SegmentMeanArgs {
  int64_t batch, heads, seq, dim, segments;
  int64_t segment_size;  // 0: by the number of valid tokens
  int64_t seq_paired;    // -1: no paired mask
  bool unit_counts;      // counts above 1 are written as 1
  Operand mask;          // [B, N]         bool, optional
  Operand paired_mask;   // [B, N']        bool, optional
  Operand x;             // forward: [B, H, N, D]    f32 | f16 | bf16
  Operand out;           // forward: [B, H, C, D]    f32 | f16 | bf16
  Operand counts;        // forward: [B, C]          i32, or f32 for logarithms, optional
  Operand dout;          // backward: [B, H, C, D]   f32 | f16 | bf16
  Operand base;          // backward: [B, H, N, D]   f32 | f16 | bf16, optional
  Operand dx;            // backward: [B, H, N, D]   f32 | f16 | bf16
};

}  // namespace subquad
