/// Arguments of the bucket_gradient kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct BucketGradientArgs {
  int64_t batch, heads_q, heads_kv, num_hashes, seq_q, seq_k, dim_qk, dim_v;
  int32_t hash_bits;
  int32_t num_samples;  // S: pairs evaluated per (row, hash), and with `exact` S more among the flipped codes
  bool exact;           // rule: "exact", else "lower_bound"
  bool causal;
  uint64_t seed;
  const int64_t* seed_ptr;  // read instead of `seed` when not null
  Operand dout;             // [B, H, N, E]     f32 | f16 | bf16
  Operand q, k, v;          // [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]     f32 | f16 | bf16
  Operand codes_q;          // [B, H, R, N]     u16 | i32
  Operand codes_k;          // [B, Hkv, R, M]   same dtype
  Operand key_mask;         // [B, M]           bool, optional
  Operand query_mask;       // [B, N]           bool, optional
  Operand dq, dk;           // like q and k
};

}  // namespace subquad
