/// Arguments of the feature_map kernels.
#pragma once
#include "core/operand.h"
#include "subquad/options.h"

namespace subquad {

struct FeatureMapArgs {
  int64_t batch, heads, projection_heads, seq, dim, num_features, feature_dim;
  Features features;
  float scale;  // s
  bool log;
  Operand x;            // [B, H, N, D]              f32 | f16 | bf16
  Operand mask;         // [B, N]                    bool, optional
  Operand projection;   // [Hp, F, D]                f32; null for elu
  Operand out;          // forward: [B, H, N, F']    f32 | f16 | bf16
  Operand log_factor;   // forward: [B, H, N]        f32, trig only, optional
  Operand dout;         // backward: [B, H, N, F']   f32 | f16 | bf16
  Operand dlog_factor;  // backward: [B, H, N]       f32, trig only, optional
  Operand dx;           // backward: [B, H, N, D]    f32 | f16 | bf16, optional
  Operand dprojection;  // backward: [Hp, F, D]      f32, optional
};

}  // namespace subquad
