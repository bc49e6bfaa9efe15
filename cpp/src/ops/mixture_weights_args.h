/// Arguments of the mixture_weights kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct MixtureWeightsArgs {
  int64_t batch, heads, seq, landmarks, samples, dim;  // samples is J
  float scale, alpha_coeff;
  bool over_queries;
  Operand q, q_bar;    // [B, H, N, D], [B, H, C, D]   f32 | f16 | bf16
  Operand column_lse;  // [B, H, C]                    f32; with over_queries
  Operand balance;     // [B, H, J]                    f32
  Operand query_mask;  // [B, N]                       bool, optional
  Operand counts;      // [B, C]                       i32, optional
  Operand log_alpha;   // forward: [B, H, N, J]        f32
  Operand dlog_alpha;  // backward: [B, H, N, J]       f32
  Operand dq;          // backward: [B, H, N, D]       f32 | f16 | bf16
  Operand dq_bar;      // backward: [B, H, C, D]       f32
  Operand dbalance;    // backward: [B, H, J]          f32
};

}  // namespace subquad
