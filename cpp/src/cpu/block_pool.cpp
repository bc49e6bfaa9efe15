#include "core/parallel.h"
#include "cpu/block_map.h"
#include "cpu/table.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

// Rows of probabilities and keys are summed in pieces of fixed length, and the pieces in order, so that the bits do not
// depend on the number of threads.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = BlockPoolArgs;

constexpr int64_t kPiece = 512;

int64_t pieces_of(int64_t tokens) { return (tokens + kPiece - 1) / kPiece; }

struct Scratch {
  int64_t* ranks;       // [B, pieces of keys + 1]: valid keys before each piece; the last one is their number
  int64_t* queries;     // [B]: kept queries
  float* column_sums;   // [B, H, pieces of queries, padded K]
  float* importance;    // [B, H, padded K]
  float* key_sums;      // [B, H, pieces of keys, padded E] or, backward, padded K
  float* column_grads;  // [B, H, padded K], backward
};

Scratch lay_out(Arena& arena, const Args& a, bool backward) {
  const int64_t heads = a.batch * a.heads, columns = padded(a.columns);
  Scratch s;
  s.ranks = take<int64_t>(arena, a.batch * (pieces_of(a.seq_k) + 1));
  s.queries = take<int64_t>(arena, a.batch);
  s.column_sums = take<float>(arena, heads * pieces_of(a.seq_q) * columns);
  s.importance = take<float>(arena, heads * columns);
  s.key_sums = take<float>(arena, heads * pieces_of(a.seq_k) * (backward ? columns : padded(a.dim)));
  s.column_grads = take<float>(arena, backward ? heads * columns : 0);
  return s;
}

void count_tokens(const Queue& queue, const Args& a, const Scratch& s) {
  const int64_t pieces = pieces_of(a.seq_k);
  core::parallel_for(queue, a.batch, [&](int64_t b, int) {
    int64_t* ranks = s.ranks + b * (pieces + 1);
    ranks[0] = 0;
    for (int64_t p = 0; p < pieces; ++p)
      ranks[p + 1] = ranks[p] + count_kept(mask_of(a.key_mask, b), p * kPiece, smaller(a.seq_k, (p + 1) * kPiece));
    s.queries[b] = count_kept(mask_of(a.query_mask, b), 0, a.seq_q);
  });
}

/// sum[0..n) += x[0..n) weight
template <class T>
void add_weighted_values(const T* x, float weight, float* sum, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(sum + i, fma(load(x + i), set(weight), load(sum + i)));
  for (; i < n; ++i) sum[i] += to_float(x[i]) * weight;
}

/// sum[0..n) += rows[0][0..n) + .. + rows[3][0..n): a quarter of the traffic of single rows.
void add_four_rows(const float* const (&row)[4], float* sum, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(sum + i, load(sum + i) + ((load(row[0] + i) + load(row[1] + i)) + (load(row[2] + i) + load(row[3] + i))));
  for (; i < n; ++i) sum[i] += (row[0][i] + row[1][i]) + (row[2][i] + row[3][i]);
}

void sum_columns(const Args& a, int64_t head, int64_t first, float* sum) {
  const int64_t b = head / a.heads, h = head % a.heads, end = smaller(a.seq_q, first + kPiece);
  const bool* keep = mask_of(a.query_mask, b);
  memset(sum, 0, size_t(padded(a.columns)) * sizeof(float));
  const float* row[4];
  int held = 0;
  for (int64_t n = first; n < end; ++n) {
    if (keep && !keep[n]) continue;
    row[held++] = element<float>(a.probs, b, h, n);
    if (held == 4) add_four_rows(row, sum, a.columns), held = 0;
  }
  for (int i = 0; i < held; ++i) add_weighted_values(row[i], 1, sum, a.columns);
}

/// total = sum of `count` rows of `size` floats, divided.
void sum_pieces(const float* rows, int64_t count, int64_t size, float divisor, float* total) {
  for (int64_t i = 0; i < size; i += kLanes) {
    F32 sum = {};
    for (int64_t p = 0; p < count; ++p) sum += load(rows + p * size + i);
    store(total + i, sum / set(divisor));
  }
}

float* importance_of(const Args& a, const Scratch& s, int64_t head) { return s.importance + head * padded(a.columns); }

/// The importance of the columns of the items with kept queries.
void weigh_columns(const Queue& queue, const Args& a, const Scratch& s) {
  const int64_t heads = a.batch * a.heads, pieces = pieces_of(a.seq_q), size = padded(a.columns);
  core::parallel_for(queue, heads * pieces, [&](int64_t task, int) {
    sum_columns(a, task / pieces, task % pieces * kPiece, s.column_sums + task * size);
  });
  core::parallel_for(queue, heads, [&](int64_t head, int) {
    const int64_t queries = s.queries[head / a.heads];
    if (queries > 0)
      sum_pieces(s.column_sums + head * pieces * size, pieces, size, float(queries), importance_of(a, s, head));
  });
}

/// Calls f(key, column) for the keys of a piece; the column of a masked one is -1.
template <class F>
void for_each_key(const Args& a, const Scratch& s, int64_t b, int64_t piece, F&& f) {
  const int64_t* ranks = s.ranks + b * (pieces_of(a.seq_k) + 1);
  const int64_t visible = ranks[pieces_of(a.seq_k)], last = smaller(a.seq_k, (piece + 1) * kPiece);
  const bool* keep = mask_of(a.key_mask, b);
  int64_t rank = ranks[piece], column = 0, end = 0;  // of the column
  for (int64_t m = piece * kPiece; m < last; ++m) {
    if (keep && !keep[m]) {
      f(m, int64_t(-1));
      continue;
    }
    if (rank >= end) column = column_of(rank, visible, a.columns), end = column_start(column + 1, visible, a.columns);
    f(m, column), ++rank;
  }
}

void pool_piece(const Args& a, const Scratch& s, int64_t head, int64_t piece, float* sum) {
  const int64_t b = head / a.heads, h = head % a.heads;
  const float* importance = importance_of(a, s, head);
  memset(sum, 0, size_t(padded(a.dim)) * sizeof(float));
  if (s.queries[b] == 0) return;
  visit_float(a.v.dtype, [&](auto tag) {
    const auto* v = element<const decltype(tag)>(a.v, b, h);
    for_each_key(a, s, b, piece, [&](int64_t m, int64_t column) {
      if (column >= 0) add_weighted_values(v + m * a.v.stride[2], importance[column], sum, a.dim);
    });
  });
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const Scratch s = lay_out(arena, a, false);
  const int64_t heads = a.batch * a.heads, pieces = pieces_of(a.seq_k), size = padded(a.dim);
  count_tokens(queue, a, s);
  weigh_columns(queue, a, s);
  core::parallel_for(queue, heads * pieces, [&](int64_t task, int) {
    pool_piece(a, s, task / pieces, task % pieces, s.key_sums + task * size);
  });
  core::parallel_for(queue, heads, [&](int64_t head, int) {
    alignas(64) float out[kMaxHeadDim];
    sum_pieces(s.key_sums + head * pieces * size, pieces, size, 1, out);
    store_row(a.out, head / a.heads, head % a.heads, 0, out, a.dim);
  });
  return nullptr;
}

/// dv of the keys of a piece, and their part of the gradients of the columns.
void spread_piece(const Args& a, const Scratch& s, int64_t head, int64_t piece, float* column_sums) {
  const int64_t b = head / a.heads, h = head % a.heads, size = padded(a.dim);
  const float* importance = importance_of(a, s, head);
  const bool any = s.queries[b] > 0;
  alignas(64) float dout[kMaxHeadDim], row[kMaxHeadDim];
  visit_float(a.dout.dtype, [&](auto tag) { widen_padded(element<const decltype(tag)>(a.dout, b, h), dout, a.dim); });
  memset(column_sums, 0, size_t(padded(a.columns)) * sizeof(float));
  for_each_key(a, s, b, piece, [&](int64_t m, int64_t column) {
    const bool used = any && column >= 0;
    if (used) {
      visit_float(a.v.dtype, [&](auto tag) { widen_padded(element<const decltype(tag)>(a.v, b, h, m), row, a.dim); });
      column_sums[column] += dot(dout, row, size);
    }
    for (int64_t i = 0; i < size; i += kLanes) store(row + i, used ? load(dout + i) * set(importance[column]) : F32{});
    if (a.base.data)
      visit_float(a.base.dtype,
                  [&](auto tag) { add_weighted_values(element<const decltype(tag)>(a.base, b, h, m), 1, row, a.dim); });
    store_row(a.dv, b, h, m, row, a.dim);
  });
}

const char* run_bwd(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  const Scratch s = lay_out(arena, a, true);
  const int64_t heads = a.batch * a.heads, pieces = pieces_of(a.seq_k), size = padded(a.columns);
  count_tokens(queue, a, s);
  weigh_columns(queue, a, s);
  core::parallel_for(queue, heads * pieces, [&](int64_t task, int) {
    spread_piece(a, s, task / pieces, task % pieces, s.key_sums + task * size);
  });
  core::parallel_for(queue, heads, [&](int64_t head, int) {
    sum_pieces(s.key_sums + head * pieces * size, pieces, size, float(larger(1, s.queries[head / a.heads])),
               s.column_grads + head * size);
  });
  const int64_t query_pieces = pieces_of(a.seq_q);
  core::parallel_for(queue, heads * query_pieces, [&](int64_t task, int) {
    const int64_t head = task / query_pieces, b = head / a.heads, first = task % query_pieces * kPiece;
    const bool* keep = mask_of(a.query_mask, b);
    for (int64_t n = first; n < smaller(a.seq_q, first + kPiece); ++n) {
      float* to = element<float>(a.dprobs, b, head % a.heads, n);
      if (keep && !keep[n])
        memset(to, 0, size_t(a.columns) * sizeof(float));
      else
        memcpy(to, s.column_grads + head * size, size_t(a.columns) * sizeof(float));
    }
  });
  return nullptr;
}

const char* supports(const Args& a) { return a.dim > kMaxHeadDim ? kTooWide : nullptr; }

template <bool Backward>
int64_t workspace_bytes(const Queue&, const Args& a) {
  Arena arena = {};
  lay_out(arena, a, Backward);
  return with_alignment(arena);
}

}  // namespace

const Slot<BlockPoolArgs> block_pool_slot = {supports, workspace_bytes<false>, run};
const Slot<BlockPoolArgs> block_pool_bwd_slot = {supports, workspace_bytes<true>, run_bwd};

}  // namespace subquad::cpu::SUBQUAD_ISA
