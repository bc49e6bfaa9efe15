/// Arguments of the sampled_proposals kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

/// Strides of axis s; stride[] of the operands is that of b, h, n.
struct SampleStrides {
  int64_t indices, noise, w, dw, score;
};

struct SampledProposalsArgs {
  int64_t batch, heads_q, heads_kv, samples, seq_q, seq_k, dim;
  float noise_std, scale;
  SampleStrides sample_stride;
  Operand q, k;      // [B, H, N, D], [B, Hkv, M, D]   f32 | f16 | bf16
  Operand indices;   // [B, H, S, N]                   i32
  Operand noise, w;  // forward: [B, H, S, N, D]       f32; noise optional
  Operand dw;        // backward: [B, H, S, N, D]      f32
  Operand score;     // backward: [B, H, S, N]         f32, optional
  Operand dq, dk;    // backward: like q, k            f32 | f16 | bf16
};

}  // namespace subquad
