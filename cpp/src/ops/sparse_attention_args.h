/// Arguments of the sparse_attention kernels.
#pragma once
#include "ops/sparse_pattern_args.h"

namespace subquad {

struct SparseAttentionArgs {
  int64_t batch, heads_q, heads_kv, seq_q, seq_k, dim, dim_v;
  float scale;
  int64_t max_entries;   // backward of blocks: room for the entries
  int64_t context_rows;  // N or 1
  PatternArgs pattern;
  Operand q, k, v;     // [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, E]  f32 | f16 | bf16
  Operand row_scale;   // [B, H, N] f32, optional
  Operand mix;         // [B, H, N] f32, optional
  Operand context;     // [B, H, N | 1, E] f32 or like out, optional; stride[2] is 0 where it has one row
  Operand query_mask;  // [B, N] bool, optional
  Operand out;         // forward: [B, H, N, E] like q
  Operand lse;         // forward: [B, H, N] f32, optional
  Operand dout;        // backward: [B, H, N, E] like q
  Operand dlse;        // backward: [B, H, N] f32, optional
  Operand dq, dk, dv;  // backward: like q, k, v in f32 or their dtype
  Operand drow_scale;  // backward: [B, H, N] f32, optional
  Operand dmix;        // backward: [B, H, N] f32, optional
  Operand dcontext;    // backward: like context, optional
};

}  // namespace subquad
