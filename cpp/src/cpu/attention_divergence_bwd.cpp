#include "cpu/divergence_rows.h"
#include "cpu/row_product.h"
#include "cpu/table.h"

// Two sweeps: tasks of queries find what forms dx in their rows, keep it for the second sweep, and sum dq; then tasks
// of keys go through all queries of their group of heads and sum dk. Both form dx anew.

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = AttentionDivergenceArgs;

// Queries and keys of a tile of the second sweep.
constexpr int64_t kTile = kTileColumns;
// Keys of a task: they share the packing of the queries. The results do not depend on their number.
constexpr int64_t kMostKeys = 256;

/// What forms dx in a row.
struct RowFacts {
  RowNorms norms;
  float mean;  // sum_r S_r (S_r - T_r); 0 where no dsse asks for it
};

struct RowScratch {
  DivergenceScratch pairs;
  RowNorms* norms;  // [block]
  float* means;     // [block, kLanes]
  float* dq;        // [block, depth]
};

RowScratch lay_out_rows(Arena& arena, const DivergenceSides& sides, int64_t block) {
  RowScratch s;
  s.pairs = take_divergence_scratch(arena, sides, block);
  s.norms = take<RowNorms>(arena, block);
  s.means = take<float>(arena, block * kLanes);
  s.dq = take<float>(arena, block * depth_of(sides.side[kStudent]));
  return s;
}

/// A vector of weights to the softmax of the student, and to what it is above that of the teacher.
struct Slopes {
  F32 student, difference;
};

inline Slopes slopes_of(const F32 (&weight)[kBoth], int v, const RowNorms& norms) {
  const F32 student = weight[v] * set(norms.inverse[kStudent]);
  return {student, student - weight[v + kPanelVectors] * set(norms.inverse[kTeacher])};
}

/// sum S (S - T), of the same S and T as in dx: where one key has nearly all the weight, their errors cancel there.
void add_mean(float* const (&logits)[kSides], int64_t count, const RowNorms& norms, float* mean) {
  for (float* side : logits) hide_unseen(side, count);
  F32 sum = load(mean);
  for (int64_t j = 0; j < count; j += kPanel) {
    F32 below[kBoth], weight[kBoth];
    weigh_panel({logits[kStudent] + j, logits[kTeacher] + j}, norms.top, below, weight);
    for (int v = 0; v < kPanelVectors; ++v) {
      const Slopes slopes = slopes_of(weight, v, norms);
      sum = fma(slopes.student, slopes.difference, sum);
    }
  }
  store(mean, sum);
}

/// What forms dx in the rows of a block; that of a row without keys means nothing.
void find_rows(const Args& a, const DivergenceSides& sides, const VisibleBlock& block, int64_t most,
               const RowScratch& s, RowFacts* rows) {
  clear(s.means, block.rows * kLanes);
  find_norms(sides, block, most, s.pairs, s.norms);
  if (a.dsse.data)
    for_each_group(sides, block, most, s.pairs, [&](const GroupTile& group) {
      for_each_row_of(group, s.pairs, [&](int64_t r, int64_t count, float* const(&logits)[kSides]) {
        add_mean(logits, count, s.norms[r], s.means + r * kLanes);
      });
    });
  for (int64_t r = 0; r < block.rows; ++r) rows[r] = {s.norms[r], reduce_add(load(s.means + r * kLanes))};
}

/// A row of logits to dx, in the place of the student's: of its first `count` keys, then zeros to the end of the tile.
void form_slopes(const Args& a, int64_t batch, int64_t head, int64_t row, const RowFacts& of, int64_t count,
                 float* const (&logits)[kSides]) {
  float* dx = logits[kStudent];
  if (count > 0) {
    for (float* side : logits) hide_unseen(side, count);
    const F32 dkl = set(a.dkl.data ? *element<float>(a.dkl, batch, head, row) : 0.0f);
    const F32 dsse = set(a.dsse.data ? 2 * *element<float>(a.dsse, batch, head, row) : 0.0f);
    for (int64_t j = 0; j < count; j += kPanel) {
      F32 below[kBoth], weight[kBoth];
      weigh_panel({logits[kStudent] + j, logits[kTeacher] + j}, of.norms.top, below, weight);
      for (int v = 0; v < kPanelVectors; ++v) {
        const Slopes slopes = slopes_of(weight, v, of.norms);
        const F32 from_sse = dsse * slopes.student * (slopes.difference - set(of.mean));
        store(dx + j + v * kLanes, fma(dkl, slopes.difference, from_sse));
      }
    }
  }
  clear(dx + count, kTileColumns - count);
}

void run_rows(const Args& a, const DivergenceSides& sides, const VisibleBlock& block, const RowScratch& s,
              RowFacts* rows) {
  const int64_t depth = depth_of(sides.side[kStudent]);
  const DivergenceScratch& pairs = s.pairs;
  const int64_t most = open_block(a, sides, block, pairs);
  find_rows(a, sides, block, most, s, rows);
  clear(s.dq, round_up(block.rows, kTileRows) * depth);
  int64_t checked = -1;
  bool all_finite = true;
  for_each_group(sides, block, most, pairs, [&](const GroupTile& group) {
    if (checked != group.first) {
      all_finite = is_finite(pairs.rows[kStudent], round_up(smaller(kTileColumns, most - group.first), kPanel) * depth);
      checked = group.first;
    }
    for (int i = 0; i < kTileRows; ++i) {
      const int64_t r = group.r + i, own = seen_from(pairs.counts[r], group.first, group.count);
      form_slopes(a, block.batch, block.head, block.first + r, rows[smaller(r, block.rows - 1)], own,
                  {pairs.logits[kStudent] + i * kTileColumns, pairs.logits[kTeacher] + i * kTileColumns});
    }
    add_weighted({pairs.logits[kStudent], kTileColumns, 1}, pairs.rows[kStudent], depth, {0, group.count}, all_finite,
                 s.dq + group.r * depth);
  });
  for (int64_t r = 0; r < block.rows; ++r) {
    scale_row(s.dq + r * depth, depth, a.scale);
    store_row(a.dq, block.batch, block.head, block.first + r, s.dq + r * depth, a.dim);
  }
}

/// Ranks [first, first + ranks) of one key head, of which some row may see the first `limit` of the item.
struct KeyBlock {
  int64_t batch, head, first, ranks, limit;
  const int32_t* positions;
};

struct KeyScratch {
  float *keys[kSides], *row;  // [keys, depth] as transposed panels; a panel of rows on its way
  float* queries[kSides];     // [kTile, depth], times the scale
  float *dx, *teacher;        // [kTile, kTile], [kTileRows, kTile]
  float* dk;                  // [keys, depth]
  int32_t* counts;            // [kTile]
};

KeyScratch lay_out_keys(Arena& arena, const DivergenceSides& sides, int64_t keys) {
  KeyScratch s;
  int64_t widest = 0;
  for (int i = 0; i < kSides; ++i) {
    const int64_t depth = depth_of(sides.side[i]);
    s.keys[i] = take<float>(arena, keys * depth);
    s.queries[i] = take<float>(arena, kTile * depth);
    widest = larger(widest, depth);
  }
  s.row = take<float>(arena, kPanel * widest);
  s.dx = take<float>(arena, kTile * kTile);
  s.teacher = take<float>(arena, kTileRows * kTile);
  s.dk = take<float>(arena, keys * depth_of(sides.side[kStudent]));
  s.counts = take<int32_t>(arena, kTile);
  return s;
}

/// Packs the queries of a tile as rows; those without keys become zeros.
void gather_queries(const LogitSide& side, const VisibleBlock& tile, const int32_t* counts, float* rows) {
  const int64_t depth = depth_of(side);
  for (int64_t r = 0; r < tile.rows; r += kPanel)
    gather_places(side.q, tile.batch, tile.head, side.dim, rows + r * depth, depth,
                  [&](int64_t i) { return r + i < tile.rows && counts[r + i] > 0 ? tile.first + r + i : int64_t(-1); });
  scale_row(rows, round_up(tile.rows, kPanel) * depth, side.scale);
}

/// Rows [lo, hi) of a tile that see more than `rank` keys, as far as the first and the last of them.
Interval rows_beyond(const int32_t* counts, int64_t rows, int64_t rank) {
  Interval seen = {0, rows};
  while (seen.lo < seen.hi && counts[seen.lo] <= rank) ++seen.lo;
  while (seen.lo < seen.hi && counts[seen.hi - 1] <= rank) --seen.hi;
  return seen;
}

/// Adds the pairs of a tile of queries and keys [at, at + kTile) of the block to dk.
void add_key_tile(const Args& a, const DivergenceSides& sides, const KeyBlock& block, const VisibleBlock& tile,
                  int64_t at, bool all_finite, const RowFacts* facts, const KeyScratch& s) {
  const int64_t first = block.first + at, count = smaller(kTile, block.ranks - at);
  const Interval rows = rows_beyond(s.counts, tile.rows, first);
  if (rows.lo >= rows.hi) return;
  for (int64_t r = rows.lo / kTileRows * kTileRows; r < rows.hi; r += kTileRows) {
    const int64_t columns = seen_from(most_seen(s.counts + r), first, count);
    float* const logits[kSides] = {s.dx + r * kTile, s.teacher};
    for (int i = 0; columns > 0 && i < kSides; ++i) {
      const int64_t depth = depth_of(sides.side[i]);
      product_of_rows(s.queries[i] + r * depth, s.keys[i] + at * depth, sides.side[i].dim, depth, logits[i], columns);
    }
    for (int64_t i = 0; i < smaller(kTileRows, tile.rows - r); ++i)
      form_slopes(a, tile.batch, tile.head, tile.first + r + i, facts[r + i], seen_from(s.counts[r + i], first, count),
                  {logits[kStudent] + i * kTile, logits[kTeacher] + i * kTile});
  }
  const int64_t depth = depth_of(sides.side[kStudent]);
  for (int64_t j = 0; j < count; j += kTileRows)
    add_weighted({s.dx + j, 1, kTile}, s.queries[kStudent], depth, rows, all_finite, s.dk + (at + j) * depth);
}

/// All rows of query head `head` against the packed keys.
void add_head(const Args& a, const DivergenceSides& sides, const KeyBlock& block, int64_t head, const RowFacts* facts,
              const KeyScratch& s) {
  for (int64_t first = 0; first < a.seq_q; first += kTile) {
    const VisibleBlock tile = {block.batch, head, first, smaller(kTile, a.seq_q - first), block.positions};
    if (load_counts(a.visible, tile, s.counts) <= block.first) continue;
    for (int i = 0; i < kSides; ++i) gather_queries(sides.side[i], tile, s.counts, s.queries[i]);
    const bool all_finite =
        is_finite(s.queries[kStudent], round_up(tile.rows, kPanel) * depth_of(sides.side[kStudent]));
    for (int64_t at = 0; at < block.ranks; at += kTile)
      add_key_tile(a, sides, block, tile, at, all_finite, facts + first, s);
  }
}

/// Zeros for the keys of no rank that lie before those of the block, and behind the last of all.
void clear_gaps(const Args& a, const KeyBlock& block, float* zeros) {
  const auto boundary = [&](int64_t rank) -> int64_t {
    if (rank == 0) return 0;
    if (rank >= block.limit) return a.seq_k;
    return key_of(block.positions, rank - 1) + 1;
  };
  clear(zeros, round_up(a.dim, kLanes));
  int64_t rank = block.first;
  for (int64_t key = boundary(rank), end = boundary(block.first + block.ranks); key < end; ++key) {
    const bool has_rank = rank < block.limit && key_of(block.positions, rank) == key;
    if (has_rank)
      ++rank;
    else
      store_row(a.dk, block.batch, block.head, key, zeros, a.dim);
  }
}

void run_keys(const Args& a, const DivergenceSides& sides, KeyBlock block, const RowFacts* facts, const KeyScratch& s) {
  const int64_t depth = depth_of(sides.side[kStudent]), group = sides.side[kStudent].group;
  const int32_t* visible = item_of(a.visible, block.batch);
  for (int64_t n = 0; n < a.seq_q; ++n) block.limit = larger(block.limit, visible[n]);
  clear_gaps(a, block, s.row);
  block.ranks = smaller(block.ranks, block.limit - block.first);
  if (block.ranks <= 0) return;
  clear(s.dk, round_up(block.ranks, kTileRows) * depth);
  for (int64_t head = block.head * group; head < (block.head + 1) * group; ++head) {
    for (int i = 0; i < kSides; ++i) {
      const bool is_new = head == block.head * group || head % sides.side[i].group == 0;
      const VisibleBlock keys = {block.batch, head, 0, 0, block.positions};
      if (is_new) pack_ranks(sides.side[i], keys, block.first, block.ranks, false, s.row, s.keys[i]);
    }
    add_head(a, sides, block, head, facts + (block.batch * a.heads_q + head) * a.seq_q, s);
  }
  for (int64_t j = 0; j < block.ranks; ++j)
    store_row(a.dk, block.batch, block.head, key_of(block.positions, block.first + j), s.dk + j * depth, a.dim);
}

auto row_layout_of(const Args& a) {
  return [sides = sides_of(a)](Arena& arena, int64_t block) { return lay_out_rows(arena, sides, block); };
}

/// Both sweeps use the same memory.
struct Plan {
  VisiblePlan rows;
  Queue key_queue;
  int64_t block_keys, key_blocks, key_tasks, key_bytes;
};

Plan plan(const Queue& queue, const Args& a) {
  Plan p = {plan_rows(queue, a.batch, a.heads_q, a.seq_q, row_layout_of(a)), queue, 0, 0, 0, 0};
  const int64_t heads = a.batch * a.heads_kv;
  p.block_keys = rows_per_task(queue.num_threads, heads, a.seq_k, kMostKeys);
  p.key_blocks = (a.seq_k + p.block_keys - 1) / p.block_keys;
  p.key_tasks = heads * p.key_blocks;
  p.key_queue.num_threads = int32_t(smaller(queue.num_threads, p.key_tasks));
  Arena keys = {};
  lay_out_keys(keys, sides_of(a), p.block_keys);
  p.key_bytes = keys.used;
  return p;
}

RowFacts* take_rows(Arena& arena, const Args& a) { return take<RowFacts>(arena, a.batch * a.heads_q * a.seq_q); }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  const Plan p = plan(queue, a);
  Arena arena = {};
  take_rows(arena, a);
  arena.used += larger(p.rows.queue.num_threads * p.rows.worker_bytes, p.key_queue.num_threads * p.key_bytes);
  return with_alignment(arena);
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  const Plan p = plan(queue, a);
  const DivergenceSides sides = sides_of(a);
  Arena shared = arena_at(workspace);
  RowFacts* facts = take_rows(shared, a);
  char* base = shared.base + shared.used;
  for_each_block(p.rows, a.positions, base, row_layout_of(a), [&](const VisibleBlock& block, const RowScratch& s) {
    run_rows(a, sides, block, s, facts + (block.batch * a.heads_q + block.head) * a.seq_q + block.first);
  });
  core::parallel_for(p.key_queue, p.key_tasks, [&](int64_t task, int worker) {
    Arena arena = {base + worker * p.key_bytes, 0};
    const KeyScratch s = lay_out_keys(arena, sides, p.block_keys);
    const int64_t head = task / p.key_blocks, first = task % p.key_blocks * p.block_keys;
    const int64_t batch = head / a.heads_kv;
    run_keys(a, sides,
             {batch, head % a.heads_kv, first, smaller(p.block_keys, a.seq_k - first), 0, item_of(a.positions, batch)},
             facts, s);
  });
  return nullptr;
}

}  // namespace

const Slot<AttentionDivergenceArgs> attention_divergence_bwd_slot = {divergence_supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
