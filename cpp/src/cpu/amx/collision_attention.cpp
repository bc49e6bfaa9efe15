#include "cpu/amx/tile_registers.h"
#include "cpu/collision_probability.h"
#include "cpu/table.h"
#include "cpu/unit_row.h"

// The forward pass for bfloat16 on tile registers. Scores are f32 sums of products of the given values; 1 / length of
// both rows comes in afterwards, for acos would magnify the rounding of a normalised row. Weights are rounded to
// bfloat16 to meet the values.

namespace subquad::cpu::x86_64_v4 {

extern const Slot<CollisionAttentionArgs> collision_attention_slot;

}  // namespace subquad::cpu::x86_64_v4

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = CollisionAttentionArgs;

constexpr int64_t kMostRows = 1024;  // of a task; the tile registers make packing dearer than it is for v4

struct Scratch {
  float *rows, *units, *panel;   // [kPanel, depth], its normalised copy, its transpose
  bfloat16* queries;             // [block, depth]
  float *inverse_q, *inverse_k;  // 1 / length, 0 for a zero row
  int32_t* keys;                 // registers [depth / kDepth][kTileColumns / kSide]
  float* value_rows;             // [kTileColumns, width]
  int32_t* values;               // registers [width / kSide][kTileColumns / kDepth]
  float* scores;                 // [kSide, kTileColumns]
  bfloat16* weights;             // [kSide, kTileColumns]
  float* sums;                   // [block, width]
};

int64_t depth_of(const Args& args) { return round_up(args.dim_qk, kDepth); }
int64_t width_of(const Args& args) { return round_up(args.dim_v, kSide); }

Scratch lay_out(Arena& arena, const Args& args, int64_t block) {
  const int64_t depth = depth_of(args), width = width_of(args);
  Scratch s;
  s.rows = take<float>(arena, kPanel * depth);
  s.units = take<float>(arena, depth);
  s.panel = take<float>(arena, kPanel * depth);
  s.queries = take<bfloat16>(arena, block * depth);
  s.inverse_q = take<float>(arena, block);
  s.inverse_k = take<float>(arena, kTileColumns);
  s.keys = take<int32_t>(arena, kTileColumns * depth / 2);
  s.value_rows = take<float>(arena, kTileColumns * width);
  s.values = take<int32_t>(arena, kTileColumns * width / 2);
  s.scores = take<float>(arena, kSide * kTileColumns);
  s.weights = take<bfloat16>(arena, kSide * kTileColumns);
  s.sums = take<float>(arena, block * width);
  return s;
}

struct Block {
  int64_t batch, head, head_kv, first, rows;
};

/// 1 / length of kPanel rows. Rows whose squares f32 cannot sum are scaled by a power of two first, in place.
void take_lengths(const Scratch& s, int64_t depth, float* inverse) {
  for (int r = 0; r < kPanel; ++r) {
    memcpy(s.units, s.rows + r * depth, size_t(depth) * sizeof(float));
    const Length length = normalize_row(s.units, depth);
    scale_row_by_power(s.rows + r * depth, depth, -length.exponent);
    inverse[r] = length.significand == 0.0f ? 0.0f : 1.0f / length.significand;
  }
}

void pack_queries(const Args& args, const Block& block, const Scratch& s) {
  const int64_t depth = depth_of(args);
  for (int64_t r = 0; r < round_up(block.rows, kSide); r += kPanel) {
    gather_rows(args.q, block.batch, block.head, block.first + r, block.rows - r, mask_of(args.query_mask, block.batch),
                args.dim_qk, s.rows, depth);
    take_lengths(s, depth, s.inverse_q + r);
    narrow(s.rows, s.queries + r * depth, kPanel * depth);
  }
}

/// Packs the keys and values [first, first + kTileColumns); those masked or past the end become zeros.
void pack_tile(const Args& args, const Block& block, int64_t first, const Scratch& s) {
  const int64_t depth = depth_of(args), width = width_of(args);
  const bool* keep = mask_of(args.key_mask, block.batch);
  for (int64_t j = 0; j < kTileColumns; j += kPanel) {
    const int64_t count = args.seq_k - first - j;
    gather_rows(args.k, block.batch, block.head_kv, first + j, count, keep, args.dim_qk, s.rows, depth);
    take_lengths(s, depth, s.inverse_k + j);
    transpose_rows(s.rows, depth, s.panel);
    for (int64_t d = 0; d < depth; d += 2) {
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        store(s.keys + column_word(d, j + c),
              pair(load(s.panel + d * kPanel + c), load(s.panel + (d + 1) * kPanel + c)));
      }
    }
    gather_rows(args.v, block.batch, block.head_kv, first + j, count, keep, args.dim_v, s.value_rows + j * width,
                width);
  }
  pack_row_words(width, s.values, [&](int64_t j, int64_t c) { return load(s.value_rows + j * width + c); });
}

/// Scores to weights u^tau, in f32 in place and rounded to bfloat16.
void form_weights(float* scores, const float* inverse_q, const float* inverse_k, int hash_bits, bfloat16* weights) {
  constexpr int kUnit = 4;
  for (int r = 0; r < kSide; ++r) {
    for (int j = r * kTileColumns; j < (r + 1) * kTileColumns; j += kUnit * kLanes) {
      F32 u[kUnit], weight[kUnit];
      for (int i = 0; i < kUnit; ++i) {
        const F32 inverse = load(inverse_k + j % kTileColumns + i * kLanes) * inverse_q[r];
        u[i] = collision_probability(load(scores + j + i * kLanes) * inverse);
      }
      raise(u, hash_bits, weight);
      for (int i = 0; i < kUnit; ++i) {
        store(scores + j + i * kLanes, weight[i]);
        store(weights + j + i * kLanes, weight[i]);
      }
    }
  }
}

/// sum [width] += weights [0, count) times value rows: the diagonal of a causal pass, where a row must not touch the
/// values that it does not see.
void add_values_of_row(const float* weights, const float* value_rows, int64_t count, int64_t width, float* sum) {
  for (int64_t c = 0; c < width; c += kLanes) {
    F32 added = {};
    for (int64_t j = 0; j < count; ++j) added = fma(set(weights[j]), load(value_rows + j * width + c), added);
    store(sum + c, load(sum + c) + added);
  }
}

/// Number of the keys [first, first + kTileColumns) that a query sees.
int64_t seen(const Args& args, int64_t query, int64_t first) {
  const int64_t end = args.causal ? smaller(args.seq_k, query + args.seq_k - args.seq_q + 1) : args.seq_k;
  return larger(0, smaller(end - first, kTileColumns));
}

void visit_rows(const Args& args, const Block& block, int64_t r, int64_t first, const Scratch& s) {
  const int64_t depth = depth_of(args), width = width_of(args), query = block.first + r;
  const int64_t rows = smaller(kSide, block.rows - r);
  if (seen(args, query + rows - 1, first) == 0) return;
  form_products({{s.queries + r * depth, s.keys}}, depth, s.scores);
  form_weights(s.scores, s.inverse_q + r, s.inverse_k, args.hash_bits, s.weights);
  if (seen(args, query, first) == smaller(kTileColumns, args.seq_k - first)) {
    add_tile_rows(s.weights, s.values, width, s.sums + r * width);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      add_values_of_row(s.scores + i * kTileColumns, s.value_rows, seen(args, query + i, first), width,
                        s.sums + (r + i) * width);
  }
}

void run_block(const Args& args, const Block& block, const Scratch& s) {
  const int64_t width = width_of(args);
  const bool *keep = mask_of(args.query_mask, block.batch), *keep_k = mask_of(args.key_mask, block.batch);
  memset(s.sums, 0, size_t(round_up(block.rows, kSide) * width) * sizeof(float));
  pack_queries(args, block, s);
  _tile_loadconfig(&kTileConfig);
  for (int64_t first = 0; seen(args, block.first + block.rows - 1, first) > 0; first += kTileColumns) {
    if (!any_kept(keep_k, first, smaller(kTileColumns, args.seq_k - first))) continue;
    pack_tile(args, block, first, s);
    for (int64_t r = 0; r < block.rows; r += kSide)
      if (any_kept(keep, block.first + r, smaller(kSide, block.rows - r))) visit_rows(args, block, r, first, s);
  }
  _tile_release();
  for (int64_t r = 0; r < block.rows; ++r) {
    float* sum = s.sums + r * width;
    if (keep && !keep[block.first + r]) memset(sum, 0, size_t(width) * sizeof(float));
    store_row(args.out, block.batch, block.head, block.first + r, sum, args.dim_v);
  }
}

/// A register of 16 queries that is mostly empty is no faster than v4.
bool fits(const Args& args) { return args.q.dtype == DType::bf16 && args.seq_q >= kSide / 2; }

TilePlan plan(const Queue& queue, const Args& args) {
  return tile_plan(queue, args, kMostRows, [&](Arena& arena, int64_t rows) { lay_out(arena, args, rows); });
}

const char* supports(const Args& args) { return x86_64_v4::collision_attention_slot.supports(args); }

int64_t workspace_bytes(const Queue& queue, const Args& args) {
  if (!fits(args)) return x86_64_v4::collision_attention_slot.workspace_bytes(queue, args);
  return workspace_of(plan(queue, args));
}

const char* run(const Queue& queue, const Args& args, void* workspace) {
  if (!fits(args)) return x86_64_v4::collision_attention_slot.run(queue, args, workspace);
  const TilePlan p = plan(queue, args);
  run_blocks(p, args, workspace,
             [&](Arena arena, const Block& block) { run_block(args, block, lay_out(arena, args, p.block_rows)); });
  return nullptr;
}

}  // namespace

const Slot<CollisionAttentionArgs> collision_attention_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
