/// Arguments of the softmax_attention kernels: one softmax per query over one to three sets of keys.
#pragma once
#include "core/operand.h"

namespace subquad {

/// Which keys m of a sweep a query n sees, with p = n + offset. Every rule is an interval [lo, hi) whose ends grow with
/// n, and so are the queries that a key is seen by.
enum class Visible : int32_t {
  all,     // every key
  band,    // p - left <= m <= p + right; -1 = no bound
  block,   // the keys of the block of p: p / block == m / block; with `causal` only m <= p
  before,  // chunks that end before the block of p begins: (m + 1) * chunk <= p / block * block
  after,   // chunks that begin after the block of p ends: m * chunk >= (p / block + 1) * block
  cell,    // n * chunk <= m < (n + 1) * chunk
};

struct VisibleRule {
  Visible kind;
  bool causal;
  int64_t offset, left, right, block, chunk;
};

struct SoftmaxSweep {
  int64_t seq_k;
  Operand k, v;         // [B, Hkv, M, D], [B, Hkv, M, E]  f32 | f16 | bf16; v null where no out is wanted
  Operand key_mask;     // [B, M]          bool, optional
  Operand key_bias;     // [B, Hbias, M]   f32, optional; query head h reads head h / bias_group
  Operand pair_bias;    // [B, H, N, M]    f32, optional
  int64_t bias_group;   // H / Hbias
  float key_norm_bias;  // c
  VisibleRule rule;
  Operand dk, dv;      // backward: like k, v   f32 | f16 | bf16; optional
  Operand dkey_bias;   // backward: [B, Hbias, M]   f32, optional
  Operand dpair_bias;  // backward: [B, H, N, M]    f32, optional
};

struct SoftmaxAttentionArgs {
  int64_t batch, heads_q, heads_kv, seq_q, dim_qk, dim_v;  // dim_v is 0 where there is no v
  float scale;
  Operand q;           // [B, H, N, D]   f32 | f16 | bf16
  Operand query_mask;  // [B, N]         bool, optional
  Operand out;         // [B, H, N, E]   f32 | f16 | bf16; forward: written, optional; backward: read, null without dout
  Operand lse;         // [B, H, N]      f32; forward: written, optional; backward: read
  Operand dout;        // backward: [B, H, N, E]   f32 | f16 | bf16, optional
  Operand dlse;        // backward: [B, H, N]      f32, optional
  Operand dq;          // backward: like q, optional
  int32_t num_sweeps;
  SoftmaxSweep sweeps[3];
};

}  // namespace subquad
