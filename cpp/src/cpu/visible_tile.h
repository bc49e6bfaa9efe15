/// Blocks of rows against the keys they see, by rank: what the kernels share that visit every pair.
#pragma once
#include "core/parallel.h"
#include "cpu/tile.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {

// Rows of a task: they share the packing of the keys. The results do not depend on their number.
static constexpr int64_t kMostVisibleRows = 512;

/// Queries and keys that give logits.
struct LogitSide {
  Operand q, k;
  int64_t group;  // query heads per key head
  int64_t dim;
  float scale;
};

static inline int64_t depth_of(const LogitSide& side) { return round_up(side.dim, kLanes); }

static inline LogitSide logit_side(const Operand& q, const Operand& k, int64_t heads_q, int64_t heads_kv, int64_t dim,
                                   float scale) {
  return {q, k, heads_kv ? heads_q / heads_kv : 1, dim, scale};
}

/// Queries [first, first + rows) of one head, and the keys of the ranks of its item (null: rank r is key r).
struct VisibleBlock {
  int64_t batch, head, first, rows;
  const int32_t* positions;
};

static inline const int32_t* item_of(const Operand& x, int64_t batch) {
  return x.data ? element<const int32_t>(x, batch) : nullptr;
}

/// Calls body(b, h, n) for the rows of arrays [B, H, N, K] and [B, H, N, M], in parallel.
template <class Args, class F>
static inline void for_each_visible_row(const Queue& queue, const Args& a, F&& body) {
  const int64_t rows = a.batch * a.heads * a.seq_q, rows_a_task = 1 + 16384 / (a.seq_k + a.columns + 16);
  core::parallel_for(queue, (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    const int64_t end = smaller(rows, (task + 1) * rows_a_task);
    for (int64_t row = task * rows_a_task; row < end; ++row)
      body(row / a.seq_q / a.heads, row / a.seq_q % a.heads, row % a.seq_q);
  });
}

/// How many keys the rows of a block see, 0 for those that fill up its last group; the largest of them.
static inline int64_t load_counts(const Operand& visible, const VisibleBlock& block, int32_t* counts) {
  const int32_t* from = item_of(visible, block.batch) + block.first;
  int64_t most = 0;
  for (int64_t r = 0; r < round_up(block.rows, kTileRows); ++r) {
    counts[r] = r < block.rows ? from[r] : 0;
    most = larger(most, counts[r]);
  }
  return most;
}

/// The most keys that one of kTileRows rows sees.
static inline int64_t most_seen(const int32_t* counts) {
  int64_t most = 0;
  for (int i = 0; i < kTileRows; ++i) most = larger(most, counts[i]);
  return most;
}

/// How many of the `size` ranks from `first` on a row of `count` keys sees.
static inline int64_t seen_from(int64_t count, int64_t first, int64_t size) {
  return larger(0, smaller(count - first, size));
}

/// The key of a rank of the block's item.
static inline int64_t key_of(const int32_t* positions, int64_t rank) { return positions ? positions[rank] : rank; }

/// Keys of ranks [first, first + count) of one head as transposed panels, zeros past `count`. `rows` holds a panel of
/// rows on its way, or keeps them all.
static inline void pack_ranks(const LogitSide& side, const VisibleBlock& block, int64_t first, int64_t count,
                              bool keeps_rows, float* rows, float* panels) {
  const int64_t pitch = depth_of(side);
  for (int64_t j = 0; j < count; j += kPanel) {
    float* to = rows + (keeps_rows ? j * pitch : 0);
    gather_places(side.k, block.batch, block.head / side.group, side.dim, to, pitch,
                  [&](int64_t r) { return j + r < count ? key_of(block.positions, first + j + r) : int64_t(-1); });
    transpose_rows(to, pitch, panels + j * pitch);
  }
}

/// The queries of a block as transposed panels, times the scale.
static inline void pack_block(const LogitSide& side, const VisibleBlock& block, float* panels) {
  pack_transposed(side.q, block.batch, block.head, block.first, block.rows, nullptr, side.dim, panels);
  scale_row(panels, round_up(block.rows, kPanel) * depth_of(side), side.scale);
}

/// Logits [kTileRows, kTileColumns] of the rows from r on for the first `columns` packed keys.
static inline void form_logits(const LogitSide& side, const float* queries, int64_t r, const float* keys,
                               int64_t columns, float* logits) {
  const int64_t depth = depth_of(side), panel = r / kPanel * kPanel, lane = r % kPanel;
  product_of_panels(queries + panel * depth + lane, keys, side.dim, depth, logits, columns);
}

/// A pass over (batch, heads, rows) in blocks of rows, and the scratch memory of its workers.
struct VisiblePlan {
  Queue queue;  // with no more threads than tasks
  int64_t heads, seq, block_rows, blocks, tasks, worker_bytes;
};

/// `lay_out(arena, block_rows)` takes the scratch memory of a worker.
template <class LayOut>
static inline VisiblePlan plan_rows(const Queue& queue, int64_t batch, int64_t heads, int64_t seq, LayOut&& lay_out) {
  VisiblePlan p = {queue, heads, seq, 0, 0, 0, 0};
  p.block_rows = rows_per_task(queue.num_threads, batch * heads, seq, kMostVisibleRows);
  p.blocks = (seq + p.block_rows - 1) / p.block_rows;
  p.tasks = batch * heads * p.blocks;
  p.queue.num_threads = int32_t(smaller(queue.num_threads, p.tasks));
  Arena arena = {};
  lay_out(arena, p.block_rows);
  p.worker_bytes = arena.used;
  return p;
}

static inline int64_t bytes_of(const VisiblePlan& p) {
  return with_alignment({nullptr, p.queue.num_threads * p.worker_bytes});
}

/// Calls body(block, scratch) for all blocks, in parallel; the late rows of a causal pass, which are long, come first.
template <class LayOut, class F>
static inline void for_each_block(const VisiblePlan& p, const Operand& positions, char* workers, LayOut&& lay_out,
                                  F&& body) {
  core::parallel_for(p.queue, p.tasks, [&](int64_t task, int worker) {
    Arena arena = {workers + worker * p.worker_bytes, 0};
    const int64_t head = task / p.blocks, batch = head / p.heads;
    const int64_t first = (p.blocks - 1 - task % p.blocks) * p.block_rows;
    const VisibleBlock block = {batch, head % p.heads, first, smaller(p.block_rows, p.seq - first),
                                item_of(positions, batch)};
    body(block, lay_out(arena, p.block_rows));
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
