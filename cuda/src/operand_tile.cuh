/// Tiles of split rows (split_rows.cuh) in shared memory, and the two products that attention takes of them with
/// tensor cores:
///
///   products[r, c] += sum_d row_r[d] column_c[d]          and          sums[r, d] += sum_c weight[r, c] column_c[d]
///
/// A warp owns 16 rows. Columns pass through shared memory in stages of [Parts][Columns][64 elements]; a row of a stage
/// has 8 elements of padding, so that ldmatrix is free of bank conflicts. Of the products of parts i and j those with
/// i + j <= 2 are taken, the small ones first: with 3 parts what is left out is 2^-26 of the product.
#pragma once
#include <cstdint>

#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "split_rows.cuh"

namespace subquad::cuda {

/// Elements of a row that a stage holds, and the distance of its rows in shared memory.
static constexpr int kChunk = 64, kChunkPitch = kChunk + 8;
static constexpr int kWarpRows = 16;

__device__ __host__ inline int chunks_of(int width) { return (width + kChunk - 1) / kChunk; }

/// Elements of shared memory for `rows` whole rows.
__device__ __host__ inline int pitch_of_rows(int width) { return width + 8; }

/// Begins to copy whole rows, from row `row` of the operand on, to `shared` [part][rows][pitch]; those behind the first
/// `present` become zeros. All threads of the block.
template <int Parts>
__device__ inline void copy_rows_async(const SplitRows& from, int64_t row, int64_t present, int rows, bfloat16* shared,
                                       int pitch) {
  const bfloat16* source = static_cast<const bfloat16*>(from.data) + row * Parts * from.width;
  const int units = from.width / 8;
  for (int i = int(threadIdx.x); i < Parts * rows * units; i += int(blockDim.x)) {
    const int unit = i % units, r = i / units % rows, part = i / units / rows;
    const bool exists = r < present;
    copy_async16(shared + (part * rows + r) * pitch + unit * 8,
                 source + (exists ? (int64_t(r) * Parts + part) * from.width + unit * 8 : 0), exists ? 16 : 0);
  }
}

/// Begins to copy a chunk of Columns rows to a stage, likewise: 8 threads a row.
template <int Parts, int Columns>
__device__ inline void copy_columns_async(const SplitRows& from, int64_t row, int present, int chunk, bfloat16* stage) {
  const int unit = int(threadIdx.x) % 8 * 8, column = chunk * kChunk + unit, step = int(blockDim.x) / 8;
  if (column >= from.width) return;
  int r = int(threadIdx.x) / 8;
  // Behind the rows that exist the address is one that is not read.
  const bfloat16* source = static_cast<const bfloat16*>(from.data) + (row + r) * Parts * from.width + column;
  bfloat16* to = stage + r * kChunkPitch + unit;
  for (; r < Columns; r += step, source += step * Parts * from.width, to += step * kChunkPitch)
#pragma unroll
    for (int part = 0; part < Parts; ++part)
      copy_async16(to + part * Columns * kChunkPitch, source + part * from.width, r < present ? 16 : 0);
}

/// sum += the product of a [16, 16] and b [16, 8]. Several parts are summed among themselves first, so that the sum
/// itself is rounded to nearest and not as tensor cores round.
template <int Parts>
__device__ inline void add_product(const uint32_t (&a)[Parts][4], const uint32_t (&b)[Parts][2], float (&sum)[4]) {
  if constexpr (Parts == 1) {
    mma_m16n8k16(sum, a[0], b[0], bfloat16{});
  } else {
    float piece[4] = {};
#pragma unroll
    for (int total = 2; total >= 0; --total)
#pragma unroll
      for (int i = 0; i < Parts; ++i)
        if (total - i >= 0 && total - i < Parts) mma_m16n8k16(piece, a[i], b[total - i], bfloat16{});
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += piece[i];
  }
}

/// products += the first `depth` elements of a chunk of the warp's rows and of a stage. `rows` is the chunk's first
/// element of the first row of the warp, [part][...][pitch] with parts `part_size` apart.
template <int Parts, int Columns>
__device__ inline void add_row_products(const bfloat16* rows, int pitch, int part_size, const bfloat16* stage,
                                        int depth, float (&products)[Columns / 8][4]) {
  const int lane = lane_id();
  rows += (lane & 15) * pitch + (lane >> 4) * 8;
  stage += ((lane >> 4) * 8 + (lane & 7)) * kChunkPitch + (lane >> 3 & 1) * 8;
#pragma unroll
  for (int step = 0; step < kChunk; step += 16) {
    if (step >= depth) break;
    uint32_t a[Parts][4];
#pragma unroll
    for (int part = 0; part < Parts; ++part) ldmatrix_x4<false>(a[part], rows + part * part_size + step);
#pragma unroll
    for (int column = 0; column < Columns; column += 16) {
      uint32_t b[2][Parts][2];
#pragma unroll
      for (int part = 0; part < Parts; ++part) {
        uint32_t loaded[4];
        ldmatrix_x4<false>(loaded, stage + (part * Columns + column) * kChunkPitch + step);
        b[0][part][0] = loaded[0], b[0][part][1] = loaded[1], b[1][part][0] = loaded[2], b[1][part][1] = loaded[3];
      }
      add_product<Parts>(a, b[0], products[column / 8]);
      add_product<Parts>(a, b[1], products[column / 8 + 1]);
    }
  }
}

/// Weights of a warp's rows as the first operand of a product, [columns / 16][part][fragment].
template <int Parts, int Columns>
using Weights = uint32_t[Columns / 16][Parts][4];

template <int Parts>
__device__ inline void split_pair(float low, float high, uint32_t (&parts)[Parts], bfloat16) {
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
    parts[part] = pack(low, high, bfloat16{});
    low -= bits_to_float(parts[part] << 16), high -= bits_to_float(parts[part] & 0xffff0000u);
  }
}

template <int Parts, int Columns>
__device__ inline void split_weights(const float (&weight)[Columns / 8][4], Weights<Parts, Columns>& weights) {
#pragma unroll
  for (int i = 0; i < Columns / 8; ++i) {
#pragma unroll
    for (int half_of_rows = 0; half_of_rows < 2; ++half_of_rows) {
      uint32_t parts[Parts];
      split_pair(weight[i][2 * half_of_rows], weight[i][2 * half_of_rows + 1], parts, bfloat16{});
#pragma unroll
      for (int part = 0; part < Parts; ++part) weights[i / 2][part][half_of_rows + i % 2 * 2] = parts[part];
    }
  }
}

/// The halves of a pair that are infinite or NaN become 0; returns 1 in their places and 0 elsewhere.
__device__ inline uint32_t take_non_finite(uint32_t& pair) {
  constexpr uint32_t exponents = 0x7f807f80u, ones = 0x3f803f80u;
  const uint32_t low = (~pair & exponents & 0xffffu) ? 0 : 0xffffu;
  const uint32_t high = (~pair & exponents & 0xffff0000u) ? 0 : 0xffff0000u;
  pair &= ~(low | high);
  return (low | high) & ones;
}

/// sums[r, d] += sum_c weight[r, c] column_c[d] over the columns of a stage and the first `width` elements. Partly:
/// weights that are 0 belong to columns that the row does not see, and what such a column holds, NaN and infinity
/// included, has no effect on the row; for one that it sees they give NaN.
template <int Parts, int Columns, bool Partly>
__device__ inline void add_weighted_columns(const Weights<Parts, Columns>& weights, const bfloat16* stage, int width,
                                            float (&sums)[kChunk / 8][4]) {
  const int lane = lane_id();
  stage += (lane & 15) * kChunkPitch + (lane >> 4) * 8;
#pragma unroll
  for (int at = 0; at < kChunk; at += 16) {
    if (at >= width) break;
    float non_finite[2][4] = {};
#pragma unroll
    for (int step = 0; step < Columns; step += 16) {
      uint32_t b[2][Parts][2];
#pragma unroll
      for (int part = 0; part < Parts; ++part) {
        uint32_t loaded[4];
        ldmatrix_x4<true>(loaded, stage + (part * Columns + step) * kChunkPitch + at);
        b[0][part][0] = loaded[0], b[0][part][1] = loaded[1], b[1][part][0] = loaded[2], b[1][part][1] = loaded[3];
      }
      if constexpr (Partly) {
        uint32_t seen[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) seen[i] = weights[step / 16][0][i] & 0x7fff7fffu;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t bad[2] = {take_non_finite(b[i][0][0]), take_non_finite(b[i][0][1])};
          mma_m16n8k16(non_finite[i], seen, bad, bfloat16{});
        }
      }
      add_product<Parts>(weights[step / 16], b[0], sums[at / 8]);
      add_product<Parts>(weights[step / 16], b[1], sums[at / 8 + 1]);
    }
    if constexpr (Partly)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (non_finite[i / 4][i % 4] > 0) sums[at / 8 + i / 4][i % 4] = bits_to_float(0x7fc00000u);
  }
}

}  // namespace subquad::cuda
