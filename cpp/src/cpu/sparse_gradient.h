/// Sizes and scratch memory of the backward pass of sparse_attention.
#pragma once
#include "cpu/sparse_rows.h"
#include "cpu/transpose.h"
#include "ops/sparse_attention_args.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// What an entry gives to its key: dv += value * dout_row, dk += score * q_row.
struct Gift {
  int32_t row;
  float value, score;
};

struct GradientPlan {
  Transposition transposition;
  int64_t longest_row;   // entries
  int64_t entries;       // of the lists that are sorted
  int64_t head_entries;  // indices: slots of one head; CSR and blocks: 0, for indptr tells
  int64_t gifts;         // of the heads of a wave
  int64_t wave;          // heads of keys that both passes visit before the next ones
  int64_t task_rows, task_keys;
};

// Gifts of a wave are still in the cache when the key pass reads them.
static constexpr int64_t kWaveBytes = 4 << 20;

static inline int64_t bounded(int64_t x, int64_t low, int64_t high) { return larger(low, smaller(x, high)); }

/// Sizes of waves and tasks; the results do not depend on them.
static inline void cut_gradient(GradientPlan& p, int num_threads, const SparseAttentionArgs& a) {
  const int64_t group = a.heads_q / larger(1, a.heads_kv), heads_kv = a.batch * a.heads_kv;
  const int64_t head_bytes = larger(1, p.gifts / larger(1, heads_kv) * int64_t(sizeof(Gift)));
  const int64_t fewest = (num_threads + group - 1) / larger(1, group);
  p.wave = bounded(kWaveBytes / head_bytes, larger(1, fewest), larger(1, heads_kv));
  p.task_rows = bounded(p.wave * group * a.seq_q / (16 * num_threads), 32, 256);
  p.task_keys = bounded(p.wave * a.seq_k / (16 * num_threads), 16, 256);
  if (p.head_entries > 0) p.gifts = smaller(p.gifts, p.wave * group * p.head_entries);
}

static inline GradientPlan plan_gradient(const Queue& queue, const SparseAttentionArgs& a) {
  GradientPlan p = {};
  const PatternArgs& pattern = a.pattern;
  p.transposition = plan_transposition(queue, a.batch * pattern.heads, a.seq_q, a.seq_k);
  if (pattern.form == PatternForm::indices) {
    p.longest_row = pattern.slots, p.head_entries = a.seq_q * pattern.slots;
    p.entries = a.batch * pattern.heads * p.head_entries, p.gifts = a.batch * a.heads_q * p.head_entries;
  } else {
    p.entries = p.gifts = pattern.form == PatternForm::csr ? pattern.entries : a.max_entries;
    p.longest_row = smaller(a.seq_k, p.entries);
  }
  cut_gradient(p, queue.num_threads, a);
  return p;
}

struct GradientScratch {
  uint32_t *early, *ends;  // of the transposition
  uint32_t* places;        // [entries]: of each entry, among the gifts of its head
  Gift* gifts;             // [gifts]: head by head, key by key, in the order of the rows
  float* rows;             // [threads][2][row_floats]: x and g of a row, each with room for a vector more
  int64_t row_floats;
};

static inline GradientScratch lay_out_gradient(Arena& arena, const Queue& queue, const GradientPlan& p) {
  GradientScratch s;
  s.row_floats = round_up(p.longest_row + kLanes, 16);
  s.early = take<uint32_t>(arena, early_counters(p.transposition));
  s.ends = take<uint32_t>(arena, p.transposition.matrices * p.transposition.columns);
  s.places = take<uint32_t>(arena, p.entries);
  s.gifts = take<Gift>(arena, p.gifts);
  s.rows = take<float>(arena, queue.num_threads * 2 * s.row_floats);
  return s;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
