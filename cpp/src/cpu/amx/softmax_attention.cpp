#include "core/parallel.h"
#include "cpu/amx/tile_registers.h"
#include "cpu/softmax_tile.h"
#include "cpu/table.h"
#include "cpu/unit_row.h"

// The forward pass on tile registers where the queries or the keys are bfloat16. The method, and the notation, is that
// of the kernel for the other rows. Queries or keys in f32 enter the products in two parts, high and low, so that
// logits are far better than one rounding to bfloat16 would leave them. Weights and values are rounded to bfloat16 when
// they meet; out is divided by the sum of the rounded weights, so that it stays a weighted mean of the values.
//
// A value that bfloat16 cannot hold, infinity and NaN among them, would spoil rows that do not see it, for a weight of
// 0 times it is NaN. It enters the product as 0, and what it adds is added to the rows that see it in f32.

namespace subquad::cpu::x86_64_v4 {

extern const Slot<SoftmaxAttentionArgs> softmax_attention_slot;

}  // namespace subquad::cpu::x86_64_v4

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SoftmaxAttentionArgs;

constexpr int64_t kMostRows = 1024;  // of a task; the tile registers make packing dearer than it is for v4
// Distance of a logit from its base that exp_shifted can tell exactly.
constexpr float kReach = 16000.0f;
// A step of the power leaves room for logits to grow by e^8 before the next one.
constexpr int kRoom = 12;
static_assert(kSide % kTileRows == 0);

struct Scratch {
  float* row;                      // [depth]
  bfloat16 *queries, *low;         // [block, depth]; the low parts only of f32
  float* key_panels;               // transposed panels of the tile
  int32_t *keys, *low_keys;        // column tiles
  float* value_rows;               // [kTileColumns, width]
  int32_t* values;                 // the same, as right factors
  float* scores;                   // [kSide, kTileColumns]
  bfloat16* weights;               // [kSide, kTileColumns]
  float* sums;                     // [block, width]
  float *totals, *divisors;        // [block, kLanes], of the weights before and after rounding
  float *bases, *powers, *limits;  // [block]; no logit so far is above the limit, and before the first that is -inf
  Interval* seen;                  // [block], keys of the sweep
};

int64_t depth_of(const Args& a) { return round_up(a.dim_qk, kDepth); }
int64_t width_of(const Args& a) { return round_up(a.dim_v, kSide); }

bool any_f32_keys(const Args& a) {
  bool found = false;
  for (int i = 0; i < a.num_sweeps; ++i) found |= a.sweeps[i].k.dtype == DType::f32;
  return found;
}

Scratch lay_out(Arena& arena, const Args& a, int64_t block) {
  const int64_t depth = depth_of(a), width = width_of(a), wanted = a.out.data != nullptr;
  Scratch s;
  s.row = take<float>(arena, depth);
  s.queries = take<bfloat16>(arena, block * depth);
  s.low = take<bfloat16>(arena, (a.q.dtype == DType::f32) * block * depth);
  s.key_panels = take<float>(arena, kTileColumns * depth);
  s.keys = take<int32_t>(arena, kTileColumns * depth / 2);
  s.low_keys = take<int32_t>(arena, any_f32_keys(a) * kTileColumns * depth / 2);
  s.value_rows = take<float>(arena, wanted * kTileColumns * width);
  s.values = take<int32_t>(arena, wanted * kTileColumns * width / 2);
  s.scores = take<float>(arena, kSide * kTileColumns);
  s.weights = take<bfloat16>(arena, kSide * kTileColumns);
  s.sums = take<float>(arena, wanted * block * width);
  s.totals = take<float>(arena, block * kLanes);
  s.divisors = take<float>(arena, block * kLanes);
  s.bases = take<float>(arena, block);
  s.powers = take<float>(arena, block);
  s.limits = take<float>(arena, block);
  s.seen = take<Interval>(arena, block);
  return s;
}

struct Block {
  int64_t batch, head, head_kv, first, rows;
};

/// x rounded to bfloat16; NaN may become another number.
inline F32 rounded(F32 x) {
  const U32 bits = as_u32(x);
  return as_f32((bits + 0x7fffu + (bits >> 16 & 1u)) & set(0xffff0000u));
}

/// Whether rounding to bfloat16 gives a finite number.
inline I32 fits_bf16(F32 x) { return abs(x) < set(0x1.ffp127f); }

/// x in two parts that bfloat16 can hold: together they are off by at most 2^-16 of it (2^-15 where rounding would
/// overflow).
struct Parts {
  F32 high, low;
};

inline Parts parts_of(F32 x) {
  const F32 cut = select(x == x, as_f32(as_u32(x) & set(0xffff0000u)), x);
  const F32 high = select(fits_bf16(x), rounded(x), cut);
  return {high, select(abs(x) < set(kInfinity), rounded(x - high), F32{})};
}

void pack_queries(const Args& a, const Block& block, const Scratch& s) {
  const int64_t depth = depth_of(a);
  const bool* keep = mask_of(a.query_mask, block.batch);
  visit_float(a.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto pack = [&](const T* from, int64_t r) {
      widen(from, s.row, a.dim_qk);
      for (int64_t d = a.dim_qk; d < depth; ++d) s.row[d] = 0;
      for (int64_t d = 0; d < depth; d += kLanes) {
        const Parts parts = parts_of(load(s.row + d));
        store(s.queries + r * depth + d, parts.high);
        if (a.q.dtype == DType::f32) store(s.low + r * depth + d, parts.low);
      }
    };
    for_each_row<T>(a.q, block.batch, block.head, block.first, block.rows, round_up(block.rows, kSide),
                    keep ? keep + block.first : nullptr, pack);
  });
}

void pack_keys(const Args& a, const SoftmaxSweep& sweep, const Block& block, KeyTile& tile, const Scratch& s) {
  const int64_t packed = round_up(a.dim_qk, kLanes);
  pack_transposed(sweep.k, block.batch, block.head_kv, tile.first, kTileColumns, tile.keep_rows, a.dim_qk,
                  s.key_panels);
  if (sweep.key_norm_bias != 0.0f) add_norm_bias(s.key_panels, a.dim_qk, packed, sweep.key_norm_bias, tile);
  for (int64_t j = 0; j < kTileColumns; j += kLanes) {
    const float* column = s.key_panels + j / kPanel * kPanel * packed + j % kPanel;
    for (int64_t d = 0; d < depth_of(a); d += 2) {
      const Parts even = d < packed ? parts_of(load(column + d * kPanel)) : Parts{};
      const Parts odd = d < packed ? parts_of(load(column + (d + 1) * kPanel)) : Parts{};
      store(s.keys + column_word(d, j), pair(even.high, odd.high));
      if (sweep.k.dtype == DType::f32) store(s.low_keys + column_word(d, j), pair(even.low, odd.low));
    }
  }
}

/// Packs the values of the tile; returns the bits of the keys whose values bfloat16 cannot hold.
uint64_t pack_values(const Args& a, const SoftmaxSweep& sweep, const Block& block, const KeyTile& tile,
                     const Scratch& s) {
  const int64_t width = width_of(a);
  uint64_t beyond = 0;
  visit_float(sweep.v.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto pack = [&](const T* from, int64_t j) {
      float* row = s.value_rows + j * width;
      widen(from, row, a.dim_v);
      for (int64_t c = a.dim_v; c < width; ++c) row[c] = 0;
      I32 outside = {};
      for (int64_t c = 0; c < width; c += kLanes) outside |= ~fits_bf16(load(row + c));
      if (any(outside)) beyond |= uint64_t(1) << j;
    };
    for_each_row<T>(sweep.v, block.batch, block.head_kv, tile.first, kTileColumns, kTileColumns, tile.keep_rows, pack);
  });
  for (int64_t j = 0; j < kTileColumns; j += 2) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const float* row = s.value_rows + j * width + c;
      const F32 even = beyond >> j & 1 ? F32{} : rounded(load(row));
      const F32 odd = beyond >> (j + 1) & 1 ? F32{} : rounded(load(row + width));
      store(s.values + row_word(j, c), pair(even, odd));
    }
  }
  return beyond;
}

/// Makes room for the logit `top`, the largest of row r and above its limit.
void raise_limit(const Args& a, const Scratch& s, int64_t r, float top) {
  const bool is_first = s.limits[r] == -kInfinity;
  float base = s.bases[r], distance = top - base;
  if (!(distance >= -kReach && distance <= kReach)) base = top, distance = 0;
  const float power = float(int32_t(distance * kLog2E) + 1 + kRoom);
  if (!is_first) {
    const F32 factor = exp_shifted(set(s.bases[r] - base), set(power - s.powers[r]));
    store(s.totals + r * kLanes, load(s.totals + r * kLanes) * factor);
    store(s.divisors + r * kLanes, load(s.divisors + r * kLanes) * factor);
    if (a.out.data) scale_row(s.sums + r * width_of(a), width_of(a), factor[0]);
  }
  s.bases[r] = base, s.powers[r] = power, s.limits[r] = base + power * float(kLn2);
}

/// Logits of row r of the block to rounded weights, within `columns`, in place and as bfloat16.
void form_weights(const Args& a, const Scratch& s, int64_t r, float* row, Interval columns, bfloat16* weights) {
  F32 top = set(-kInfinity);
  for (int64_t j = columns.lo; j < columns.hi; j += kLanes) top = max(load(row + j), top);
  if (any(top > set(s.limits[r]))) raise_limit(a, s, r, reduce_max(top));
  const F32 base = set(s.bases[r]), power = set(s.powers[r]);
  F32 total = load(s.totals + r * kLanes), divisor = load(s.divisors + r * kLanes);
  // Pairs of vectors go through the long chain of operations together; columns begin and end at multiples of kLanes.
  for (int64_t j = columns.lo; j < columns.hi; j += 2 * kLanes) {
    const bool both = j + kLanes < columns.hi;
    F32 weight[2] = {load(row + j) - base, both ? load(row + j + kLanes) - base : set(-kInfinity)};
    exp_shifted(weight, power);
    for (int v = 0; v <= int(both); ++v) {
      store(weights + j + v * kLanes, weight[v]);
      const F32 kept = load(weights + j + v * kLanes);
      store(row + j + v * kLanes, kept);
      total += weight[v], divisor += kept;
    }
  }
  store(s.totals + r * kLanes, total), store(s.divisors + r * kLanes, divisor);
}

const float* pair_bias_row(const SoftmaxSweep& sweep, const Block& block, int64_t r, const KeyTile& tile) {
  const Operand& b = sweep.pair_bias;
  const float* base = static_cast<const float*>(b.data) + block.batch * b.stride[0] + block.head * b.stride[1];
  return base + (block.first + smaller(r, block.rows - 1)) * b.stride[2] + tile.first;
}

/// Products of kTileRows rows, from row r of the block on, to weights; those outside of what they see are 0.
void finish_group(const Args& a, const SoftmaxSweep& sweep, const Block& block, int64_t r, const KeyTile& tile,
                  const Seen& seen, const Scratch& s) {
  float* scores = s.scores + r % kSide * kTileColumns;
  bfloat16* weights = s.weights + r % kSide * kTileColumns;
  const bool is_empty = seen.all.lo >= seen.all.hi;
  if (is_empty || seen.all.lo > 0 || seen.all.hi < kTileColumns)
    memset(weights, 0, size_t(kTileRows * kTileColumns) * sizeof(bfloat16));
  if (is_empty) return;
  if (sweep.pair_bias.data) {
    const float* rows[kTileRows];
    for (int i = 0; i < kTileRows; ++i) rows[i] = pair_bias_row(sweep, block, r + i, tile);
    finish_logits(tile, seen, rows, scores);
  } else if (tile.has_bias || tile.has_gaps || !seen.is_whole) {
    finish_logits(tile, seen, nullptr, scores);
  }
  for (int i = 0; i < kTileRows; ++i)
    form_weights(a, s, r + i, scores + i * kTileColumns, seen.all, weights + i * kTileColumns);
}

/// Adds the values that bfloat16 cannot hold to the rows that see them.
void add_beyond(const Args& a, const KeyTile& tile, int64_t r, uint64_t beyond, const Scratch& s) {
  const int64_t width = width_of(a);
  for (int64_t j = 0; j < tile.count; ++j) {
    if (!(beyond >> j & 1)) continue;
    for (int64_t i = 0; i < kSide; ++i) {
      const Interval seen = s.seen[r + i];
      if (tile.first + j < seen.lo || tile.first + j >= seen.hi) continue;
      const F32 weight = set(s.scores[i * kTileColumns + j]);
      float* sum = s.sums + (r + i) * width;
      for (int64_t c = 0; c < width; c += kLanes)
        store(sum + c, fma(weight, load(s.value_rows + j * width + c), load(sum + c)));
    }
  }
}

/// kSide rows of the block, from its row r on, against the packed tile.
void visit_rows(const Args& a, const SoftmaxSweep& sweep, const Block& block, int64_t r, const KeyTile& tile,
                uint64_t beyond, const Scratch& s) {
  const int64_t depth = depth_of(a);
  const bfloat16* queries = s.queries + r * depth;
  if (a.q.dtype == DType::f32)
    form_products({{queries, s.keys}, {s.low + r * depth, s.keys}}, depth, s.scores);
  else if (sweep.k.dtype == DType::f32)
    form_products({{queries, s.keys}, {queries, s.low_keys}}, depth, s.scores);
  else
    form_products({{queries, s.keys}}, depth, s.scores);
  scale_row(s.scores, kSide * kTileColumns, a.scale);
  for (int64_t i = 0; i < kSide; i += kTileRows)
    finish_group(a, sweep, block, r + i, tile, seen_in_tile(s.seen + r + i, tile), s);
  if (!a.out.data) return;
  add_tile_rows(s.weights, s.values, width_of(a), s.sums + r * width_of(a));
  if (beyond) add_beyond(a, tile, r, beyond, s);
}

/// Rows [lo, hi) of the block, whole groups of kSide, against the keys from `first` on, as far as they fit a tile.
void visit_tile(const Args& a, const SoftmaxSweep& sweep, const Block& block, Interval rows, int64_t first,
                const Scratch& s) {
  KeyTile tile;
  if (!open_tile(sweep, block.batch, block.head, first, tile)) return;
  pack_keys(a, sweep, block, tile, s);
  const uint64_t beyond = a.out.data ? pack_values(a, sweep, block, tile, s) : 0;
  const bool* keep = mask_of(a.query_mask, block.batch);
  for (int64_t r = rows.lo; r < rows.hi; r += kSide)
    if (any_kept(keep, block.first + r, smaller(kSide, block.rows - r)))
      visit_rows(a, sweep, block, r, tile, beyond, s);
}

/// The tiles of a sweep that some row of the block sees. Intervals grow with the row, and so do the rows of a tile.
void visit_sweep(const Args& a, const SoftmaxSweep& sweep, const Block& block, const Scratch& s) {
  const int64_t rows = round_up(block.rows, kSide);
  for (int64_t r = 0; r < rows; ++r)
    s.seen[r] = keys_seen(sweep.rule, block.first + smaller(r, block.rows - 1), sweep.seq_k);
  Interval seeing = {0, 0};
  const int64_t begin = s.seen[0].lo / kTileColumns * kTileColumns, end = s.seen[rows - 1].hi;
  for (int64_t first = begin; first < end; first += kTileColumns) {
    while (s.seen[seeing.lo + kSide - 1].hi <= first) seeing.lo += kSide;
    seeing.hi = larger(seeing.lo, seeing.hi);
    while (seeing.hi < rows && s.seen[seeing.hi].lo < smaller(end, first + kTileColumns)) seeing.hi += kSide;
    if (seeing.lo < seeing.hi) visit_tile(a, sweep, block, seeing, first, s);
  }
}

/// Writes out and lse.
void finish_rows(const Args& a, const Block& block, const Scratch& s) {
  const bool* keep = mask_of(a.query_mask, block.batch);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.first + r, width = width_of(a);
    const bool kept = !keep || keep[row];
    const float total = kept ? reduce_add(load(s.totals + r * kLanes)) : 0.0f;
    if (a.out.data) {
      float* sum = s.sums + r * width;
      const float divisor = kept ? reduce_add(load(s.divisors + r * kLanes)) : 0.0f;
      if (divisor == 0.0f)
        memset(sum, 0, size_t(width) * sizeof(float));
      else
        divide_row(sum, width, divisor);
      store_row(a.out, block.batch, block.head, row, sum, a.dim_v);
    }
    if (a.lse.data) {
      float* lse = static_cast<float*>(a.lse.data) + block.batch * a.lse.stride[0] + block.head * a.lse.stride[1];
      lse[row * a.lse.stride[2]] = total == 0.0f ? -kInfinity : log_length({total, int(s.powers[r])}) + s.bases[r];
    }
  }
}

void run_block(const Args& a, const Block& block, const Scratch& s) {
  const int64_t rows = round_up(block.rows, kSide);
  if (a.out.data) memset(s.sums, 0, size_t(rows * width_of(a)) * sizeof(float));
  memset(s.totals, 0, size_t(rows * kLanes) * sizeof(float));
  memset(s.divisors, 0, size_t(rows * kLanes) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) s.bases[r] = 0, s.powers[r] = 0, s.limits[r] = -kInfinity;
  if (any_kept(mask_of(a.query_mask, block.batch), block.first, block.rows)) {
    pack_queries(a, block, s);
    _tile_loadconfig(&kTileConfig);
    for (int i = 0; i < a.num_sweeps; ++i)
      if (a.sweeps[i].seq_k > 0) visit_sweep(a, a.sweeps[i], block, s);
    _tile_release();
  }
  finish_rows(a, block, s);
}

/// Nothing is gained without bfloat16 in the logits, nor with a register of 16 queries that is mostly empty.
bool fits(const Args& a) {
  bool all = a.seq_q >= kSide / 2 && (a.q.dtype == DType::f32 || a.q.dtype == DType::bf16);
  for (int i = 0; i < a.num_sweeps; ++i) {
    const DType k = a.sweeps[i].k.dtype, v = a.sweeps[i].v.dtype;
    all &= k == DType::bf16 || (k == DType::f32 && a.q.dtype == DType::bf16);
    all &= !a.out.data || v == DType::bf16 || v == DType::f32;
  }
  return all;
}

struct Plan {
  Queue queue;
  int64_t block_rows, blocks, tasks, worker_bytes;
};

Plan plan(const Queue& queue, const Args& a) {
  const int64_t heads = a.batch * a.heads_q;
  const int64_t rows = round_up(rows_per_task(queue.num_threads, heads, a.seq_q, kMostRows), kSide);
  const int64_t blocks = (a.seq_q + rows - 1) / rows;
  Arena arena = {};
  lay_out(arena, a, rows);
  Plan p = {queue, rows, blocks, heads * blocks, arena.used};
  p.queue.num_threads = int32_t(smaller(queue.num_threads, p.tasks));
  return p;
}

const char* supports(const Args& a) { return x86_64_v4::softmax_attention_slot.supports(a); }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  if (!fits(a)) return x86_64_v4::softmax_attention_slot.workspace_bytes(queue, a);
  const Plan p = plan(queue, a);
  return with_alignment({nullptr, p.queue.num_threads * p.worker_bytes});
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  if (!fits(a)) return x86_64_v4::softmax_attention_slot.run(queue, a, workspace);
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
