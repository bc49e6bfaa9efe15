/// Arguments of the sea_estimate kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

/// Dense f32 arrays; of each the rows may be apart (stride[0]), inner axes are contiguous.
struct SeaWeightArgs {
  Operand projection, position;
  Operand encoder_weight, encoder_bias, encoder_norm_weight, encoder_norm_bias;
  Operand scaler_weight, scaler_bias;
  Operand row_weight, row_bias, row_norm_weight, row_norm_bias;
  Operand conv1_weight, conv1_bias, conv2_weight, conv2_bias;
  Operand out_weight, out_bias, norm_weight, norm_bias;
};

struct SeaStateArgs {
  Operand s, z, rows1, rows2, count;
};

struct SeaEstimateArgs {
  int64_t batch, heads, seq, dim;
  int64_t features;   // m
  int64_t channels;   // C = splits H
  int64_t splits;     // 2 (causal) or 4
  int64_t width;      // w
  int64_t columns;    // K
  int64_t positions;  // P, causal only
  bool is_causal;
  SeaWeightArgs weights;
  Operand key_mask;        // [B, N] bool, optional
  Operand q, k, v;         // [B, H, N, D] f32 | f16 | bf16
  SeaStateArgs state;      // optional
  SeaStateArgs new_state;  // optional
  Operand probs;           // [B, H, N, K] f32
  Operand row_scale, mix;  // [B, H, N] f32
};

}  // namespace subquad
