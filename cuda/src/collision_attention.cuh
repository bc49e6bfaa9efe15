/// One kernel for the forward pass and both halves of the backward pass. It owns a block of rows, visits the columns
/// tile by tile, and sums over them
///
///   partner_sum[i] = sum_j u(x_ij)^tau partner_j        (Sum)
///   unit_sum[i]    = sum_j c_ij unit_j,   c_ij = <partner_i, partner_j> dp/dx(x_ij)        (Gradient)
///
/// Rows are queries with columns (k, v), or keys with columns (q, dout). A warp owns 16 rows; the tile's products, then
/// weights, and the sums of 64 * Chunks elements of its rows are in its registers. Wider results are cut into slices,
/// each of which computes the weights again. Both operands come split into parts (split_rows.cuh), so masks, strides
/// and lengths are dealt with before; chunks of columns pass through a ring of stages (cp.async), one barrier each.
/// Each block writes its rows alone: no atomics, the same bits in every run.
///
/// Bound by the instructions of u^tau. For bfloat16, tau = 8 and D = E = 64 a pair of a lane takes 18 of them for the
/// weight, 29 for weight and coefficient, and 15 to 25 more for its share of products, copies and loops: 0.26 clocks
/// per pair and SM forward, 0.40 for dq and 0.44 for dk and dv if every slot is used, against 0.09 to 0.19 of tensor
/// cores and 0.16 to 0.33 of shared memory. With 12 or 16 warps an SM about 0.8 of the slots: 96 heads of 16384 tokens
/// take 37 ms forward and 57 + 62 ms backward. L2: a block of 96 rows (forward), 128 (dq) or 64 (dk and dv) reads all
/// columns once, there 69, 52 and 103 GB or 13, 9 and 19 ms; registers allow no wider blocks. Shared memory there: 50,
/// 55 and 37 KiB for the factors of two tiles, 4 stages of Parts * Columns * 144 bytes and the block's rows.
#pragma once
#include "collision_weights.cuh"

namespace subquad::cuda {

/// Shared memory: the factors of two tiles, the stages, the rows of both operands.
template <class K>
struct CollisionMemory {
  int rows, unit_pitch, partner_pitch;
  int64_t unit_size, partner_size;  // of one part of the rows

  __device__ __host__ CollisionMemory(const CollisionPass& p, int warps)
      : rows(warps * kWarpRows),
        unit_pitch(pitch_of_rows(p.column_unit.width)),
        partner_pitch(K::Gradient ? pitch_of_rows(p.column_partner.width) : 0),
        unit_size(int64_t(rows) * unit_pitch),
        partner_size(int64_t(rows) * partner_pitch) {}

  __device__ __host__ int64_t bytes() const {
    const int64_t elements = K::kStages * K::kStageSize + K::Parts * (unit_size + partner_size);
    return 2 * K::kColumns * int64_t(sizeof(float)) + elements * int64_t(sizeof(bfloat16));
  }
};

/// Writes a warp's rows of a result, the first `width` of its 64 * Chunks columns; row[i] is this lane's row or null.
template <int Chunks, class Y>
__device__ inline void store_sums(const float (&sums)[Chunks][kChunk / 8][4], Y* const (&row)[2], int64_t width) {
#pragma unroll
  for (int chunk = 0; chunk < Chunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < kChunk / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = chunk * kChunk + 8 * i + lane_id() % 4 * 2 + (c & 1);
        if (row[c >> 1] && column < width) from_float(sums[chunk][i][c], row[c >> 1] + column);
      }
    }
  }
}

/// Writes partner_sum, zeros in masked rows.
template <class Y, int Chunks>
__device__ inline void store_partner_sums(const CollisionPass& p, const RowBlock& block, int64_t first_row,
                                          float (&sums)[Chunks][kChunk / 8][4]) {
  const int64_t column = int64_t(block.slice) * Chunks * kChunk;
  Y* row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t n = first_row + lane_id() / 4 + 8 * i;
    row[i] = n < p.row_unit.seq ? element<Y>(p.partner_sum, block.batch, block.head, n) + column : nullptr;
    if (!row[i] || is_kept(p.row_mask, block.batch, n)) continue;
#pragma unroll
    for (int c = 0; c < Chunks * kChunk / 4; ++c) sums[c / 16][c % 16 / 2][2 * i + c % 2] = 0;
  }
  store_sums(sums, row, p.dim_partner - column);
}

template <int Chunks>
__device__ inline void store_unit_sums(const CollisionPass& p, const RowBlock& block, int64_t first_row,
                                       const float (&sums)[Chunks][kChunk / 8][4]) {
  const int64_t column = int64_t(block.slice) * Chunks * kChunk, width = p.row_unit.width;
  float* row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t n = first_row + lane_id() / 4 + 8 * i, head = block.batch * p.row_unit.heads + block.head;
    row[i] = n < p.row_unit.seq ? p.unit_sum + (head * p.row_unit.seq + n) * width + column : nullptr;
  }
  store_sums(sums, row, width - column);
}

/// sums += the weights times the columns of a stage, as far as the rows see them.
template <class K>
__device__ inline void add_seen_columns(const SeenTile& seen, const Weights<K::Parts, K::kColumns>& weights,
                                        const bfloat16* stage, int width, float (&sums)[kChunk / 8][4]) {
  if (seen.all)
    add_weighted_columns<K::Parts, K::kColumns, false>(weights, stage, width, sums);
  else if (seen.any)
    add_weighted_columns<K::Parts, K::kColumns, true>(weights, stage, width, sums);
}

/// What a warp sums over all tiles.
template <class K>
struct WarpSums {
  float partner[K::Chunks][kChunk / 8][4], unit[K::Chunks][kChunk / 8][4];
};

/// What a warp knows of its rows.
template <class K>
struct WarpRows {
  int64_t first;  // token
  const bfloat16 *units, *partners;
  int unit_pitch, partner_pitch, unit_size, partner_size;
  float factor[2];
};

/// products = dot products of whole rows of one operand, and the stage of their last chunk.
template <class K>
__device__ inline const bfloat16* multiply_rows(ColumnStream<K>& stream, const SeenTile& seen, const bfloat16* rows,
                                                int pitch, int part_size, int width,
                                                float (&products)[K::kColumns / 8][4]) {
  const bfloat16* stage = nullptr;
  for (int at = 0; at < width; at += kChunk) {
    stage = stream.next();
    if (seen.any) add_row_products<K::Parts, K::kColumns>(rows + at, pitch, part_size, stage, width - at, products);
  }
  return stage;
}

/// Adds a result's chunks of one tile, which arrive one by one.
template <class K>
__device__ inline void add_chunks(ColumnStream<K>& stream, const SeenTile& seen,
                                  const Weights<K::Parts, K::kColumns>& weights, int width,
                                  float (&sums)[K::Chunks][kChunk / 8][4]) {
#pragma unroll
  for (int chunk = 0; chunk < K::Chunks; ++chunk) {
    if (chunk * kChunk >= width) break;
    add_seen_columns<K>(seen, weights, stream.next(), width - chunk * kChunk, sums[chunk]);
  }
}

/// One tile of columns. Every warp of the block takes every stage, whatever it sees of it.
template <class K>
__device__ inline void visit_tile(const CollisionPass& p, ColumnStream<K>& stream, const WarpRows<K>& rows,
                                  const SeenTile& seen, const float* column_factor, int slice, WarpSums<K>& sums) {
  constexpr int kColumns = K::kColumns;
  const int unit_width = p.column_unit.width, partner_width = p.column_partner.width;
  float units[kColumns / 8][4] = {};
  Weights<K::Parts, kColumns> weights;
  const bfloat16* stage = multiply_rows(stream, seen, rows.units, rows.unit_pitch, rows.unit_size, unit_width, units);
  if constexpr (K::Gradient) {
    float partners[kColumns / 8][4] = {};
    const bfloat16* const unit_stage = stage;
    stage = multiply_rows(stream, seen, rows.partners, rows.partner_pitch, rows.partner_size, partner_width, partners);
    if (seen.any) to_coefficients<kColumns>(units, partners, rows.factor, column_factor, p.hash_bits, p.exact);
    if (!seen.all) clear_unseen<kColumns>(seen, partners);
    split_weights<K::Parts, kColumns>(partners, weights);
    if constexpr (K::kReload)
      add_chunks<K>(stream, seen, weights, unit_width - slice * K::Chunks * kChunk, sums.unit);
    else
      add_seen_columns<K>(seen, weights, unit_stage, unit_width, sums.unit[0]);
  } else {
    if (seen.any) to_weights<kColumns>(units, rows.factor, column_factor, p.hash_bits);
  }
  if constexpr (K::Sum) {
    if (!seen.all) clear_unseen<kColumns>(seen, units);
    split_weights<K::Parts, kColumns>(units, weights);
    if constexpr (K::Gradient)
      add_seen_columns<K>(seen, weights, stage, partner_width, sums.partner[0]);
    else
      add_chunks<K>(stream, seen, weights, partner_width - slice * K::Chunks * kChunk, sums.partner);
  }
}

/// Begins to copy the block's rows and returns what this warp needs of them.
template <class K>
__device__ inline WarpRows<K> copy_block_rows(const CollisionPass& p, const RowBlock& block,
                                              const CollisionMemory<K>& memory, bfloat16* units) {
  const int64_t head = block.batch * p.row_unit.heads + block.head;
  const int before = warp_id() * kWarpRows;
  bfloat16* const partners = units + K::Parts * memory.unit_size;
  WarpRows<K> rows = {block.first + before,
                      units + before * memory.unit_pitch,
                      partners + before * memory.partner_pitch,
                      memory.unit_pitch,
                      memory.partner_pitch,
                      int(memory.unit_size),
                      int(memory.partner_size),
                      {}};
  const int64_t row = head * p.row_unit.seq + block.first, present = p.row_unit.seq - block.first;
  copy_rows_async<K::Parts>(p.row_unit, row, present, memory.rows, units, memory.unit_pitch);
  if constexpr (K::Gradient)
    copy_rows_async<K::Parts>(p.row_partner, row, present, memory.rows, partners, memory.partner_pitch);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t n = rows.first + lane_id() / 4 + 8 * i;
    if (n < p.row_unit.seq) rows.factor[i] = p.row_unit.factor[head * p.row_unit.factor_pitch + n];
  }
  return rows;
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    collision_kernel(const __grid_constant__ CollisionPass p, int slices) {
  constexpr int kColumns = K::kColumns;
  const CollisionMemory<K> memory(p, int(blockDim.x) / kWarp);
  float* const factors = dynamic_shared<float>();
  bfloat16* const stages = reinterpret_cast<bfloat16*>(factors + 2 * kColumns);
  const RowBlock block = row_block(p, K::Chunks == 1 ? 1 : slices);
  const WarpRows<K> rows = copy_block_rows<K>(p, block, memory, stages + K::kStages * K::kStageSize);
  const TileRange tiles = tiles_of<kColumns>(p, block, memory.rows);
  ColumnStream<K> stream(p, block.slice, tiles, stages, factors);
  // The first of these takes the block's rows with it.
  stream.issue(), stream.issue();

  WarpSums<K> sums = {};
  const float* column_factor = factors + lane_id() % 4 * 2;
  for (int head = tiles.head_begin; head < tiles.head_end; ++head) {
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const SeenTile seen = seen_tile<kColumns>(p, rows.first, tile);
      visit_tile<K>(p, stream, rows, seen, column_factor, block.slice, sums);
      column_factor += column_factor < factors + kColumns ? kColumns : -kColumns;
    }
  }
  // A block without tiles still has its rows under way.
  copy_async_wait<0>();
  if constexpr (K::Gradient) store_unit_sums(p, block, rows.first, sums.unit);
  if constexpr (K::Sum) {
    if (p.partner_sum.dtype == DType::f32) store_partner_sums<float>(p, block, rows.first, sums.partner);
    if (p.partner_sum.dtype == DType::f16) store_partner_sums<half>(p, block, rows.first, sums.partner);
    if (p.partner_sum.dtype == DType::bf16) store_partner_sums<bfloat16>(p, block, rows.first, sums.partner);
  }
}

}  // namespace subquad::cuda
