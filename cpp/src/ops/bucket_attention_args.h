/// Arguments of the bucket_attention kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct BucketAttentionArgs {
  int64_t batch, heads_q, heads_kv, num_hashes, seq_q, seq_k, dim_v;
  int64_t num_buckets;
  float scale;
  bool causal;
  Operand codes_q;     // [B, H, R, N]     u16 | i32
  Operand codes_k;     // [B, Hkv, R, M]   same dtype
  Operand key_mask;    // [B, M]           bool, optional
  Operand query_mask;  // [B, N]           bool, optional
  Operand rows;        // v [B, Hkv, M, E], or in the backward pass dout [B, H, N, E]     f32 | f16 | bf16
  Operand out;         // out [B, H, N, E], or in the backward pass dv [B, Hkv, M, E]     f32 | f16 | bf16
};

}  // namespace subquad
