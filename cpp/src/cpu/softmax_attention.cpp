#include "core/parallel.h"
#include "cpu/softmax_rows.h"
#include "cpu/table.h"

// A task owns a block of queries and visits the keys they see, sweep by sweep and tile by tile. What it keeps of a
// row is described in softmax_rows.h.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SoftmaxAttentionArgs;

struct Scratch {
  float* queries;        // transposed panels of the block, times the scale
  float *keys, *values;  // of the tile: transposed panels, and rows cut into panels
  float* scores;         // [kTileRows, kTileColumns]
  RunningRows rows;
};

int64_t depth_of(const Args& a) { return round_up(a.dim_qk, kLanes); }

Scratch lay_out(Arena& arena, const Args& a, int64_t block) {
  const int64_t depth = depth_of(a), wanted = a.out.data != nullptr;
  Scratch s;
  s.queries = take<float>(arena, block * depth);
  s.keys = take<float>(arena, kTileColumns * depth);
  s.values = take<float>(arena, wanted * kTileColumns * round_up(a.dim_v, kPanel));
  s.scores = take<float>(arena, kTileRows * kTileColumns);
  s.rows = take_running_rows(arena, a, block, false);
  return s;
}

/// Raises the limits that a logit of the tile exceeds and subtracts the bases.
void take_limits(const Args& a, const Scratch& s, int64_t r, Interval columns) {
  I32 above = {};
  bool has_base = false;
  for (int i = 0; i < kTileRows; ++i) {
    F32 top = set(-kInfinity);
    for (int64_t j = columns.lo; j < columns.hi; j += kLanes) top = max(load(s.scores + i * kTileColumns + j), top);
    above |= top > set(s.rows.limits[r + i]);
    has_base |= s.rows.bases[r + i] != 0.0f;
  }
  if (!any(above) && !has_base) return;
  for (int i = 0; i < kTileRows; ++i) {
    float* row = s.scores + i * kTileColumns;
    F32 top = set(-kInfinity);
    for (int64_t j = columns.lo; j < columns.hi; j += kLanes) top = max(load(row + j), top);
    if (const float largest = reduce_max(top); largest > s.rows.limits[r + i]) raise_limit(a, s.rows, r + i, largest);
    const F32 base = set(s.rows.bases[r + i]);
    for (int64_t j = columns.lo; j < columns.hi; j += kLanes) store(row + j, load(row + j) - base);
  }
}

/// `Count` vectors of the logits of a row to weights, added to the total.
template <int Count>
inline void weigh(float* row, F32 power, F32& total) {
  F32 weight[Count];
  for (int v = 0; v < Count; ++v) weight[v] = load(row + v * kLanes);
  exp_shifted(weight, power);
  for (int v = 0; v < Count; ++v) store(row + v * kLanes, weight[v]);
  for (int v = 0; v < Count; ++v) total += weight[v];
}

/// Logits to weights, added to the totals.
void to_weights(const Scratch& s, int64_t r, Interval columns) {
  constexpr int kUnit = 4;
  for (int i = 0; i < kTileRows; ++i) {
    float *row = s.scores + i * kTileColumns, *to = s.rows.totals + (r + i) * kLanes;
    const F32 power = set(s.rows.powers[r + i]);
    F32 total = load(to);
    int64_t j = columns.lo;
    for (; j + kUnit * kLanes <= columns.hi; j += kUnit * kLanes) weigh<kUnit>(row + j, power, total);
    for (; j < columns.hi; j += kLanes) weigh<1>(row + j, power, total);
    store(to, total);
  }
}

/// sums += weights times values. Weights of 0 times values that are not finite would be NaN, so where a row does not
/// see them all they are left out, row by row; the terms and their order are the same.
void add_values(const Args& a, const Scratch& s, int64_t r, const Seen& seen, bool all_finite) {
  const int64_t width = padded(a.dim_v), lo = seen.all.lo;
  float* sums = s.rows.sums + r * width;
  if (all_finite || seen.is_whole) {
    add_weighted_rows(s.scores + lo, s.values + lo * kPanel, smaller(seen.all.hi, seen.row[kTileRows - 1].hi) - lo,
                      sums, width, a.dim_v);
    return;
  }
  for (int i = 0; i < kTileRows; ++i) {
    const Interval own = seen.row[i];
    add_weighted_row(s.scores + i * kTileColumns + own.lo, s.values + own.lo * kPanel, own.hi - own.lo,
                     sums + i * width, a.dim_v);
  }
}

/// kTileRows rows of the block, from its row r on, against the packed tile.
void visit_rows(const Args& a, const SoftmaxSweep& sweep, const Block& block, int64_t r, const KeyTile& tile,
                bool all_finite, const Scratch& s) {
  const Seen seen = seen_in_tile(s.rows.seen + r, tile);
  if (seen.all.lo >= seen.all.hi) return;
  const int64_t depth = depth_of(a), panel = r / kPanel * kPanel, lane = r % kPanel;
  product_of_panels(s.queries + panel * depth + lane, s.keys + seen.all.lo * depth, a.dim_qk, depth,
                    s.scores + seen.all.lo, seen.all.hi - seen.all.lo);
  to_logits(sweep, block, r, tile, seen, s.scores);
  take_limits(a, s, r, seen.all);
  to_weights(s, r, seen.all);
  if (a.out.data) add_values(a, s, r, seen, all_finite);
}

/// Rows [lo, hi) of the block, whole groups, against the keys from `first` on, as far as they fit a tile.
void visit_tile(const Args& a, const SoftmaxSweep& sweep, const Block& block, Interval rows, int64_t first,
                const Scratch& s) {
  KeyTile tile;
  if (!open_tile(sweep, block.batch, block.head, first, tile)) return;
  pack_transposed(sweep.k, block.batch, block.head_kv, first, tile.count, tile.keep_rows, a.dim_qk, s.keys);
  if (sweep.key_norm_bias != 0.0f) add_norm_bias(s.keys, a.dim_qk, depth_of(a), sweep.key_norm_bias, tile);
  bool all_finite = true;
  if (a.out.data)
    all_finite = pack_split(sweep.v, block.batch, block.head_kv, first, tile.count, tile.keep_rows, a.dim_v, s.values);
  const bool* keep = mask_of(a.query_mask, block.batch);
  // Each group of rows asks for its share of the next tile.
  const int64_t groups = (rows.hi - rows.lo) / kTileRows, share = (kTileColumns + groups - 1) / groups;
  const int64_t end = smaller(first + 2 * kTileColumns, s.rows.seen[rows.hi - 1].hi);
  int64_t next = first + kTileColumns;
  for (int64_t r = rows.lo; r < rows.hi; r += kTileRows) {
    for (const int64_t stop = smaller(end, next + share); next < stop; ++next) {
      prefetch_row(sweep.k, block.batch, block.head_kv, next, a.dim_qk);
      if (a.out.data) prefetch_row(sweep.v, block.batch, block.head_kv, next, a.dim_v);
    }
    if (any_kept(keep, block.first + r, smaller(kTileRows, block.rows - r)))
      visit_rows(a, sweep, block, r, tile, all_finite, s);
  }
}

void pack_queries(const Args& a, const Block& block, const Scratch& s) {
  const bool* keep = mask_of(a.query_mask, block.batch);
  pack_transposed(a.q, block.batch, block.head, block.first, block.rows, keep ? keep + block.first : nullptr, a.dim_qk,
                  s.queries);
  scale_row(s.queries, round_up(block.rows, kPanel) * depth_of(a), a.scale);
}

void run_block(const Args& a, const Block& block, const Scratch& s) {
  clear_rows(a, round_up(block.rows, kTileRows), s.rows);
  if (any_kept(mask_of(a.query_mask, block.batch), block.first, block.rows)) {
    pack_queries(a, block, s);
    for (int i = 0; i < a.num_sweeps; ++i) {
      const SoftmaxSweep& sweep = a.sweeps[i];
      if (sweep.seq_k == 0) continue;
      for_each_tile<kTileRows>(sweep, block, s.rows.seen,
                               [&](Interval rows, int64_t first) { visit_tile(a, sweep, block, rows, first, s); });
    }
  }
  finish_rows(a, block, s.rows);
}

// The rows of a task share the packing of the keys. The results do not depend on their number.
constexpr int64_t kMostRows = 512;

struct Plan {
  Queue queue;
  int64_t block_rows, blocks, tasks, worker_bytes;
};

Plan plan(const Queue& queue, const Args& a) {
  const int64_t heads = a.batch * a.heads_q;
  const int64_t rows = rows_per_task(queue.num_threads, heads, a.seq_q, kMostRows);
  const int64_t blocks = (a.seq_q + rows - 1) / rows;
  Arena arena = {};
  lay_out(arena, a, rows);
  Plan p = {queue, rows, blocks, heads * blocks, arena.used};
  p.queue.num_threads = int32_t(smaller(queue.num_threads, p.tasks));
  return p;
}

const char* supports(const Args& a) { return larger(a.dim_qk, a.dim_v) > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = plan(queue, a);
  return with_alignment({nullptr, p.queue.num_threads * p.worker_bytes});
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = plan(queue, a);
  char* base = arena_at(workspace).base;
  core::parallel_for(p.queue, p.tasks, [&](int64_t task, int worker) {
    Arena arena = {base + worker * p.worker_bytes, 0};
    const Scratch s = lay_out(arena, a, p.block_rows);
    // The long rows of a causal pass first.
    const int64_t head = task / p.blocks, first = (p.blocks - 1 - task % p.blocks) * p.block_rows;
    const int64_t head_q = head % a.heads_q, head_kv = head_q / (a.heads_q / a.heads_kv);
    run_block(a, {head / a.heads_q, head_q, head_kv, first, smaller(p.block_rows, a.seq_q - first)}, s);
  });
  return nullptr;
}

}  // namespace

const Slot<SoftmaxAttentionArgs> softmax_attention_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
