/// Both passes of bucket_attention as one product: sources add their rows to buckets, targets sum up their buckets.
#pragma once
#include "device/language.cuh"
#include "ops/bucket_attention_args.h"

namespace subquad::cuda {

/// The tokens of one side: `group` heads of `tokens` tokens for every (batch, kv head).
struct BucketSide {
  Operand codes;  // [B, Hkv * group, R, tokens]  u16 | i32
  Operand mask;   // [B, tokens]                  bool, optional
  int64_t group, tokens;
};

/// out[b, t] = scale * sum_r sum_s [codes equal] rows[b, s]. Forward the sources are the keys of a kv head and the
/// targets the queries of its group; backward the queries are the sources.
struct BucketProblem {
  int64_t batch, heads_kv, num_hashes, dim, num_buckets;
  BucketSide sources, targets;
  Operand rows;  // [B, Hkv * sources.group, sources.tokens, E]  f32 | f16 | bf16
  Operand out;   // [B, Hkv * targets.group, targets.tokens, E]  f32 | f16 | bf16
  float scale;
  bool causal, backward;
};

inline BucketProblem bucket_problem(const BucketAttentionArgs& a, bool backward) {
  const int64_t group = a.heads_kv ? a.heads_q / a.heads_kv : 0;
  const BucketSide queries = {a.codes_q, a.query_mask, group, a.seq_q}, keys = {a.codes_k, a.key_mask, 1, a.seq_k};
  return {
      a.batch, a.heads_kv, a.num_hashes, a.dim_v,  a.num_buckets, backward ? queries : keys, backward ? keys : queries,
      a.rows,  a.out,      a.scale,      a.causal, backward};
}

/// The sources that a target sees with causal order: [0, bound) forward, [bound, tokens) backward. The bound may lie
/// outside [0, tokens].
__host__ __device__ inline int64_t causal_bound(const BucketProblem& p, int64_t target) {
  return p.backward ? target - (p.targets.tokens - p.sources.tokens) : target + 1 + p.sources.tokens - p.targets.tokens;
}

}  // namespace subquad::cuda
