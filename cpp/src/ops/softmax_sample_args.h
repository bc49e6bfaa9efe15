/// Arguments of the softmax_sample kernel.
#pragma once
#include "core/operand.h"

namespace subquad {

struct SoftmaxSampleArgs {
  int64_t batch, heads_q, heads_kv, samples, seq_q, seq_k, dim;
  float scale;
  uint64_t seed;
  const int64_t* seed_ptr;  // read in place of seed if not null
  Operand q, k;             // [B, H, N, D], [B, Hkv, M, D]  f32 | f16 | bf16
  Operand key_mask;         // [B, M]        bool, optional
  Operand indices;          // [B, H, S, N]  i32
};

}  // namespace subquad
