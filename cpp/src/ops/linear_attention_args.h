/// Arguments of the linear_attention kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct LinearAttentionArgs {
  int64_t batch, heads_q, heads_kv, seq_q, seq_k, dim_features, dim_v;
  bool log_features, causal, normalize;
  bool weighted;                    // with key_log_weight, even if there is no key
  bool gated;                       // the decay is a gate: a key comes in with weight 1 - decay
  Operand fq, fk, v;                // [B, H, N, F], [B, Hkv, M, F], [B, Hkv, M, E]   f32 | f16 | bf16
  Operand key_log_weight;           // [B, Hkv, M]      f32, optional
  Operand key_mask;                 // [B, M]           bool, optional
  Operand decay;                    // [B, Hkv, M]      f32, optional; the last axis may have stride 0
  Operand s, z, shift;              // state in: [B, Hkv, F, E], [B, Hkv, F], [B, Hkv, F]   f32, optional
  Operand out;                      // forward: [B, H, N, E]   f32 | f16 | bf16
  Operand new_s, new_z, new_shift;  // forward: like the state in, optional
  Operand dout;                     // backward: [B, H, N, E]   f32 | f16 | bf16
  Operand dfq, dfk, dv;             // backward: like fq, fk, v   f32 | f16 | bf16
  Operand dkey_log_weight, ddecay;  // backward: [B, Hkv, M]   f32, optional
};

}  // namespace subquad
