#include "cpu/amx/tile_registers.h"
#include "cpu/softmax_rows.h"
#include "cpu/table.h"

// The forward pass on tile registers where the queries or the keys are bfloat16. The method is that of the kernel for
// the other rows. Queries or keys in f32 enter the products in two parts, high and low, so that logits are far better
// than one rounding to bfloat16 would leave them. Weights and values are rounded to bfloat16 when they meet; out is
// divided by the sum of the rounded weights, so that it stays a weighted mean of the values.
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
static_assert(kSide % kTileRows == 0 && kSide == 16);  // padded() fills whole registers

struct Scratch {
  float* row;                // [depth]
  bfloat16 *queries, *low;   // [block, depth]; the low parts only of f32
  float* key_panels;         // transposed panels of the tile
  int32_t *keys, *low_keys;  // column tiles
  float* value_rows;         // [kTileColumns, width]
  int32_t* values;           // the same, as right factors
  float* scores;             // [kSide, kTileColumns]
  bfloat16* weights;         // [kSide, kTileColumns]
  RunningRows rows;
};

int64_t depth_of(const Args& a) { return round_up(a.dim_qk, kDepth); }
int64_t width_of(const Args& a) { return padded(a.dim_v); }

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
  s.rows = take_running_rows(arena, a, block, true);
  return s;
}

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
  pack_row_words(width, s.values, [&](int64_t j, int64_t c) {
    return beyond >> j & 1 ? F32{} : rounded(load(s.value_rows + j * width + c));
  });
  return beyond;
}

/// Logits of row r of the block to rounded weights, within `columns`, in place and as bfloat16.
void form_weights(const Args& a, const Scratch& s, int64_t r, float* row, Interval columns, bfloat16* weights) {
  F32 top = set(-kInfinity);
  for (int64_t j = columns.lo; j < columns.hi; j += kLanes) top = max(load(row + j), top);
  if (any(top > set(s.rows.limits[r]))) raise_limit(a, s.rows, r, reduce_max(top));
  const F32 base = set(s.rows.bases[r]), power = set(s.rows.powers[r]);
  F32 total = load(s.rows.totals + r * kLanes), divisor = load(s.rows.divisors + r * kLanes);
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
  store(s.rows.totals + r * kLanes, total), store(s.rows.divisors + r * kLanes, divisor);
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
  to_logits(sweep, block, r, tile, seen, scores);
  for (int i = 0; i < kTileRows; ++i)
    form_weights(a, s, r + i, scores + i * kTileColumns, seen.all, weights + i * kTileColumns);
}

/// Adds the values that bfloat16 cannot hold to the rows that see them.
void add_beyond(const Args& a, const KeyTile& tile, int64_t r, uint64_t beyond, const Scratch& s) {
  const int64_t width = width_of(a);
  for (int64_t j = 0; j < tile.count; ++j) {
    if (!(beyond >> j & 1)) continue;
    for (int64_t i = 0; i < kSide; ++i) {
      const Interval seen = s.rows.seen[r + i];
      if (tile.first + j < seen.lo || tile.first + j >= seen.hi) continue;
      const F32 weight = set(s.scores[i * kTileColumns + j]);
      float* sum = s.rows.sums + (r + i) * width;
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
    finish_group(a, sweep, block, r + i, tile, seen_in_tile(s.rows.seen + r + i, tile), s);
  if (!a.out.data) return;
  add_tile_rows(s.weights, s.values, width_of(a), s.rows.sums + r * width_of(a));
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

void run_block(const Args& a, const Block& block, const Scratch& s) {
  clear_rows(a, round_up(block.rows, kSide), s.rows);
  if (any_kept(mask_of(a.query_mask, block.batch), block.first, block.rows)) {
    pack_queries(a, block, s);
    _tile_loadconfig(&kTileConfig);
    for (int i = 0; i < a.num_sweeps; ++i) {
      const SoftmaxSweep& sweep = a.sweeps[i];
      if (sweep.seq_k == 0) continue;
      for_each_tile<kSide>(sweep, block, s.rows.seen,
                           [&](Interval rows, int64_t first) { visit_tile(a, sweep, block, rows, first, s); });
    }
    _tile_release();
  }
  finish_rows(a, block, s.rows);
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

TilePlan plan(const Queue& queue, const Args& a) {
  return tile_plan(queue, a, kMostRows, [&](Arena& arena, int64_t rows) { lay_out(arena, a, rows); });
}

const char* supports(const Args& a) { return x86_64_v4::softmax_attention_slot.supports(a); }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  if (!fits(a)) return x86_64_v4::softmax_attention_slot.workspace_bytes(queue, a);
  return workspace_of(plan(queue, a));
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  if (!fits(a)) return x86_64_v4::softmax_attention_slot.run(queue, a, workspace);
  const TilePlan p = plan(queue, a);
  run_blocks(p, a, workspace,
             [&](Arena arena, const Block& block) { run_block(a, block, lay_out(arena, a, p.block_rows)); });
  return nullptr;
}

}  // namespace

const Slot<SoftmaxAttentionArgs> softmax_attention_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
