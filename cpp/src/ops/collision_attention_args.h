/// Arguments of the collision_attention kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct CollisionAttentionArgs {
  int64_t batch, heads_q, heads_kv, seq_q, seq_k, dim_qk, dim_v;
  int32_t hash_bits;
  bool causal;
  bool exact;          // backward: exact derivative, else the lower-bound surrogate
  Operand q, k, v;     // [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]     f32 | f16 | bf16
  Operand key_mask;    // [B, M]           bool, optional
  Operand query_mask;  // [B, N]           bool, optional
  Operand out;         // forward: [B, H, N, E]    f32 | f16 | bf16
  Operand dout;        // backward: [B, H, N, E]   f32 | f16 | bf16
  Operand dq, dk, dv;  // backward: like q, k, v; dv optional
};

}  // namespace subquad
