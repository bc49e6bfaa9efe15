/// Products of bfloat16 on tile registers: what the AMX kernels share.
///
/// A register holds 16 rows of 64 bytes; as the right factor of a product it holds pairs of bfloat16: word
/// [d / 2][column] = (B[d][column], B[d + 1][column]). Sums are f32.
#pragma once
#include "core/parallel.h"
#include "cpu/tile.h"

namespace subquad::cpu::SUBQUAD_ISA {

static constexpr int kSide = 16;              // rows of a register, and words of its rows
static constexpr int kDepth = 32;             // products that one instruction adds to each element
static constexpr int kWords = kSide * kSide;  // words of a register
static constexpr int kRowBytes = 64;          // of a register
static_assert(kTileColumns == 4 * kSide);     // the registers 0 to 3 of form_products

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

static constexpr TileConfig kTileConfig = {
    1,
    0,
    {},
    {kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes},
    {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide}};

/// Two vectors of floats that bfloat16 can hold, as one of pairs.
static inline I32 pair(F32 even, F32 odd) { return (I32)(as_u32(even) >> 16 | (as_u32(odd) & 0xffff0000u)); }

/// The tile loads are volatile assembly to g++, which does not say that they read memory.
static inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

/// Words of a column tile of `depth` steps (a multiple of kDepth), registers [depth / kDepth][kTileColumns / kSide], at
/// step d and column c.
static inline int64_t column_word(int64_t d, int64_t c) {
  return (d / kDepth * (kTileColumns / kSide) + c / kSide) * kWords + d % kDepth / 2 * kSide + c % kSide;
}

/// Words of the rows of a tile as right factors, registers [width / kSide][kTileColumns / kDepth], at row j and column
/// c.
static inline int64_t row_word(int64_t j, int64_t c) {
  return (c / kSide * (kTileColumns / kDepth) + j / kDepth) * kWords + j % kDepth / 2 * kSide + c % kSide;
}

/// The rows of a tile as right factors: at(j, c) is the vector of row j at column c, of numbers that bfloat16 can hold.
template <class F>
static inline void pack_row_words(int64_t width, int32_t* words, F&& at) {
  for (int64_t j = 0; j < kTileColumns; j += 2)
    for (int64_t c = 0; c < width; c += kLanes) store(words + row_word(j, c), pair(at(j, c), at(j + 1, c)));
}

/// Rows [kSide, depth] and a column tile, whose products belong to one sum.
struct TileTerm {
  const bfloat16* rows;
  const int32_t* columns;
};

/// products [kSide, kTileColumns] = the sum over the terms of rows times columns.
template <int Terms>
static inline void form_products(const TileTerm (&terms)[Terms], int64_t depth, float* products) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < Terms; ++i) {
    const bfloat16* rows = terms[i].rows;
    const int32_t* columns = terms[i].columns;
    for (int64_t d = 0; d < depth; d += kDepth, columns += 4 * kWords) {
      _tile_loadd(4, rows + d, depth * 2);
      _tile_loadd(5, columns, kRowBytes);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, columns + kWords, kRowBytes);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, columns + 2 * kWords, kRowBytes);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, columns + 3 * kWords, kRowBytes);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, products, kTileColumns * 4);
  _tile_stored(1, products + kSide, kTileColumns * 4);
  _tile_stored(2, products + 2 * kSide, kTileColumns * 4);
  _tile_stored(3, products + 3 * kSide, kTileColumns * 4);
}

/// sums [kSide, width] += weights [kSide, kTileColumns] times the rows of a tile.
static inline void add_tile_rows(const bfloat16* weights, const int32_t* rows, int64_t width, float* sums) {
  finish_stores();
  _tile_loadd(4, weights, kTileColumns * 2);
  _tile_loadd(5, weights + kDepth, kTileColumns * 2);
  for (int64_t c = 0; c < width; c += kSide, rows += 2 * kWords) {
    _tile_loadd(0, sums + c, width * 4);
    _tile_loadd(6, rows, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, rows + kWords, kRowBytes);
    _tile_dpbf16ps(0, 5, 7);
    _tile_stored(0, sums + c, width * 4);
  }
}

/// The queries of an attention pass in blocks, one to a task.
struct TilePlan {
  Queue queue;
  int64_t block_rows, blocks, tasks, worker_bytes;
};

/// Blocks of up to `most` rows, in whole registers; lay_out(arena, rows) takes the scratch of a worker.
template <class Args, class F>
static inline TilePlan tile_plan(const Queue& queue, const Args& a, int64_t most, F&& lay_out) {
  const int64_t heads = a.batch * a.heads_q;
  const int64_t rows = round_up(rows_per_task(queue.num_threads, heads, a.seq_q, most), kSide);
  const int64_t blocks = (a.seq_q + rows - 1) / rows;
  Arena arena = {};
  lay_out(arena, rows);
  TilePlan p = {queue, rows, blocks, heads * blocks, arena.used};
  p.queue.num_threads = int32_t(smaller(queue.num_threads, p.tasks));
  return p;
}

static inline int64_t workspace_of(const TilePlan& p) {
  return with_alignment({nullptr, p.queue.num_threads * p.worker_bytes});
}

/// Calls run(arena of the worker, {batch, head, head_kv, first row, rows}) for every block.
template <class Args, class F>
static inline void run_blocks(const TilePlan& p, const Args& a, void* workspace, F&& run) {
  char* base = arena_at(workspace).base;
  core::parallel_for(p.queue, p.tasks, [&](int64_t task, int worker) {
    // The long rows of a causal pass first.
    const int64_t head = task / p.blocks, first = (p.blocks - 1 - task % p.blocks) * p.block_rows;
    const int64_t head_q = head % a.heads_q, head_kv = head_q / (a.heads_q / a.heads_kv);
    run(Arena{base + worker * p.worker_bytes, 0},
        {head / a.heads_q, head_q, head_kv, first, smaller(p.block_rows, a.seq_q - first)});
  });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
