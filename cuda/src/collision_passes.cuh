/// The launches of collision_attention for one form of split rows, and the scratch memory that they share. Host code:
/// a template, so that each storage type is compiled in a file of its own.
#pragma once
#include "collision_attention.cuh"
#include "collision_gradient.cuh"
#include "device/launch.cuh"
#include "ops/collision_attention_args.h"

namespace subquad::cuda {

/// Forward and backward by storage type of q, k and v.
const char* run_collision_f32(const Queue& queue, const CollisionAttentionArgs& args, void* workspace);
const char* run_collision_f16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace);
const char* run_collision_bf16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace);
const char* run_collision_bwd_f32(const Queue& queue, const CollisionAttentionArgs& args, void* workspace);
const char* run_collision_bwd_f16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace);
const char* run_collision_bwd_bf16(const Queue& queue, const CollisionAttentionArgs& args, void* workspace);

struct CollisionScratch {
  SplitRows q, k, v, dout;
  float* unit_sum;  // of the queries, then of the keys
};

static inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

static inline SplitRows take_split_rows(Arena& arena, int64_t batch, int64_t heads, int64_t seq, int64_t dim, int parts,
                                        bool factors) {
  SplitRows rows = {nullptr, nullptr, heads, seq, round_up(seq, 4), int32_t(round_up(dim, 16))};
  rows.data = take<uint16_t>(arena, batch * heads * seq * parts * rows.width);
  if (factors) rows.factor = take<float>(arena, batch * heads * rows.factor_pitch);
  return rows;
}

static inline CollisionScratch take_scratch(Arena& arena, const CollisionAttentionArgs& a, int parts, bool backward) {
  CollisionScratch s = {};
  s.q = take_split_rows(arena, a.batch, a.heads_q, a.seq_q, a.dim_qk, parts, true);
  s.k = take_split_rows(arena, a.batch, a.heads_kv, a.seq_k, a.dim_qk, parts, true);
  s.v = take_split_rows(arena, a.batch, a.heads_kv, a.seq_k, a.dim_v, parts, false);
  if (!backward) return s;
  s.dout = take_split_rows(arena, a.batch, a.heads_q, a.seq_q, a.dim_v, parts, false);
  const int64_t queries = a.heads_q * a.seq_q, keys = a.heads_kv * a.seq_k;
  s.unit_sum = take<float>(arena, a.batch * (queries > keys ? queries : keys) * s.q.width);
  return s;
}

static inline dim3 grid_of_rows(int64_t rows) {
  constexpr int64_t kRows = kSplitThreads / kWarp;
  return dim3(unsigned((rows + kRows - 1) / kRows));
}

/// Splits q, k and v, and dout where `s` has room for it.
template <int Parts>
const char* split_operands(const Queue& queue, const CollisionAttentionArgs& a, const CollisionScratch& s) {
  SplitTasks tasks = {{{a.q, a.query_mask, s.q, a.dim_qk},
                       {a.k, a.key_mask, s.k, a.dim_qk},
                       {a.v, a.key_mask, s.v, a.dim_v},
                       {a.dout, a.query_mask, s.dout, a.dim_v}},
                      a.batch};
  const int64_t queries = a.heads_q * a.seq_q, keys = a.heads_kv * a.seq_k;
  dim3 grid = grid_of_rows(a.batch * (queries > keys ? queries : keys));
  if (grid.x == 0) return nullptr;
  grid.y = s.dout.width ? 4 : 3;
  const bool narrow = s.q.width <= 64 && s.v.width <= 64;
  const auto kernel = narrow ? split_rows_kernel<2, Parts> : split_rows_kernel<8, Parts>;
  return launch(queue, kernel, grid, dim3(kSplitThreads), 0, tasks);
}

// Shared memory of a block, within what devices of version 8.0 have. Where there is less, blocks have fewer rows.
static constexpr int64_t kMostShared = 160 * 1024;

template <class K>
const char* launch_pass(const Queue& queue, const CollisionPass& p) {
  const int64_t available = most_shared_bytes(queue), most = available < kMostShared ? available : kMostShared;
  int warps = K::kThreads / kWarp;
  while (warps > 1 && CollisionMemory<K>(p, warps).bytes() > most) warps /= 2;
  const int64_t rows = warps * kWarpRows, blocks = (p.row_unit.seq + rows - 1) / rows;
  const int chunks = chunks_of(K::Gradient ? p.column_unit.width : p.column_partner.width);
  const int slices = (chunks + K::Chunks - 1) / K::Chunks;
  const dim3 grid(unsigned(p.batch * p.row_unit.heads * blocks * slices));
  if (grid.x == 0) return nullptr;
  return launch(queue, collision_kernel<K>, grid, dim3(unsigned(warps * kWarp)),
                size_t(CollisionMemory<K>(p, warps).bytes()), p, slices);
}

/// partner_sum alone.
template <int Parts>
const char* run_sum_pass(const Queue& queue, const CollisionPass& p) {
  if (p.column_partner.width <= kChunk) return launch_pass<CollisionKernel<Parts, 1, false, true>>(queue, p);
  return launch_pass<CollisionKernel<Parts, 2, false, true>>(queue, p);
}

/// unit_sum, and partner_sum where it is wanted.
template <int Parts>
const char* run_gradient_pass(const Queue& queue, const CollisionPass& p) {
  const bool narrow = p.column_unit.width <= kChunk && p.column_partner.width <= kChunk;
  if (narrow && p.partner_sum.data) return launch_pass<CollisionKernel<Parts, 1, true, true>>(queue, p);
  if (narrow) return launch_pass<CollisionKernel<Parts, 1, true, false>>(queue, p);
  if (const char* error = launch_pass<CollisionKernel<Parts, 2, true, false>>(queue, p)) return error;
  return p.partner_sum.data ? run_sum_pass<Parts>(queue, p) : nullptr;
}

static inline CollisionPass query_rows(const CollisionAttentionArgs& a, const CollisionScratch& s) {
  CollisionPass p = {};
  p.row_unit = s.q, p.column_unit = s.k, p.column_partner = s.v;
  p.row_mask = a.query_mask, p.partner_sum = a.out;
  p.batch = a.batch, p.dim_partner = a.dim_v, p.hash_bits = a.hash_bits, p.exact = a.exact, p.causal = a.causal;
  return p;
}

template <class X>
const char* run_gradient(const Queue& queue, const CollisionGradient& g) {
  const dim3 grid = grid_of_rows(g.batch * g.heads * g.seq);
  if (grid.x == 0) return nullptr;
  const auto kernel = g.dim <= 64 ? collision_gradient_kernel<2, X> : collision_gradient_kernel<8, X>;
  return launch(queue, kernel, grid, dim3(kSplitThreads), 0, g);
}

template <int Parts>
const char* run_forward(const Queue& queue, const CollisionAttentionArgs& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const CollisionScratch s = take_scratch(arena, a, Parts, false);
  if (const char* error = split_operands<Parts>(queue, a, s)) return error;
  return run_sum_pass<Parts>(queue, query_rows(a, s));
}

template <class X, int Parts>
const char* run_backward(const Queue& queue, const CollisionAttentionArgs& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const CollisionScratch s = take_scratch(arena, a, Parts, true);
  if (const char* error = split_operands<Parts>(queue, a, s)) return error;

  CollisionPass queries = query_rows(a, s);
  queries.row_partner = s.dout, queries.unit_sum = s.unit_sum, queries.partner_sum = {};
  if (const char* error = run_gradient_pass<Parts>(queue, queries)) return error;
  const CollisionGradient dq = {a.q, a.query_mask, a.dq, s.unit_sum, a.batch, a.heads_q, a.seq_q, a.dim_qk, s.q.width};
  if (const char* error = run_gradient<X>(queue, dq)) return error;

  CollisionPass keys = queries;
  keys.rows_are_keys = true;
  keys.row_unit = s.k, keys.row_partner = s.v, keys.column_unit = s.q, keys.column_partner = s.dout;
  keys.row_mask = a.key_mask, keys.partner_sum = a.dv;
  if (const char* error = run_gradient_pass<Parts>(queue, keys)) return error;
  const CollisionGradient dk = {a.k, a.key_mask, a.dk, s.unit_sum, a.batch, a.heads_kv, a.seq_k, a.dim_qk, s.k.width};
  return run_gradient<X>(queue, dk);
}

}  // namespace subquad::cuda
