/// The sides of a pass of collision_attention, what its rows see, and its columns on their way to shared memory.
#pragma once
#include "operand_tile.cuh"

namespace subquad::cuda {

struct CollisionPass {
  SplitRows row_unit, row_partner, column_unit, column_partner;  // row_partner only for the gradient
  Operand row_mask, partner_sum;  // [batch, rows]; result [batch, heads of the rows, rows, dim_partner]
  float* unit_sum;                // result [batch, heads of the rows, rows, width of row_unit]
  int64_t batch, dim_partner;
  int32_t hash_bits;
  bool exact, causal, rows_are_keys;
};

/// What an instance of the kernel computes, and the sizes that follow.
template <int PartsOf, int ChunksOf, bool GradientOf, bool SumOf>
struct CollisionKernel {
  static constexpr int Parts = PartsOf, Chunks = ChunksOf;
  static constexpr bool Gradient = GradientOf, Sum = SumOf;
  // More rows share the columns of a block where registers allow 12 or 16 warps an SM.
  static constexpr bool kLean = Parts == 1 && Chunks == 1 && !(Gradient && Sum);
  static constexpr int kColumns = Parts == 1 && !(Gradient && Chunks == 1) ? 64 : 32;
  static constexpr int kThreads = !kLean ? 128 : Gradient ? 256 : 192;
  static constexpr int kBlocks = Parts == 1 && Gradient && Sum ? 3 : 2;
  // With one chunk each of units and partners both stages of a tile are still there for the second product.
  static constexpr bool kReload = Gradient && Chunks > 1;
  static constexpr int kStages = 4, kStageSize = Parts * kColumns * kChunkPitch;
};

struct ColumnRange {
  int64_t lo, hi;
};

/// Columns that a row sees.
__device__ inline ColumnRange seen_by(const CollisionPass& p, int64_t row) {
  const int64_t rows = p.row_unit.seq, columns = p.column_unit.seq;
  if (!p.causal) return {0, columns};
  int64_t bound = p.rows_are_keys ? row - (rows - columns) : row + (columns - rows) + 1;
  bound = bound < 0 ? 0 : bound > columns ? columns : bound;
  return p.rows_are_keys ? ColumnRange{bound, columns} : ColumnRange{0, bound};
}

/// The rows and the slice of the result that a block owns.
struct RowBlock {
  int64_t batch, head, first;
  int slice;
};

__device__ inline RowBlock row_block(const CollisionPass& p, int slices) {
  const int64_t rows = int64_t(blockDim.x) / kWarp * kWarpRows, blocks = (p.row_unit.seq + rows - 1) / rows;
  const int64_t head = int64_t(blockIdx.x) / blocks / slices, index = int64_t(blockIdx.x) % blocks;
  // The long rows of a causal pass first: queries from the end, keys from the start.
  return {head / p.row_unit.heads, head % p.row_unit.heads, (p.rows_are_keys ? index : blocks - 1 - index) * rows,
          slices == 1 ? 0 : int(int64_t(blockIdx.x) / blocks % slices)};
}

/// What a warp's rows see of a tile of columns.
struct SeenTile {
  bool any, all;
  int lo[2], hi[2];  // of the two rows of this lane, relative to the tile
};

template <int Columns>
__device__ inline SeenTile seen_tile(const CollisionPass& p, int64_t first_row, int tile) {
  if (!p.causal) return {first_row < p.row_unit.seq, first_row < p.row_unit.seq, {}, {}};
  const int64_t first = int64_t(tile) * Columns;
  const ColumnRange top = seen_by(p, first_row), bottom = seen_by(p, first_row + kWarpRows - 1);
  const int64_t columns = p.column_unit.seq, end = first + Columns < columns ? first + Columns : columns;
  SeenTile seen = {};
  seen.any = first_row < p.row_unit.seq && bottom.hi > first && top.lo < end;
  seen.all = seen.any && bottom.lo <= first && top.hi >= end;
  if (seen.all || !seen.any) return seen;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const ColumnRange range = seen_by(p, first_row + lane_id() / 4 + 8 * i);
    seen.lo[i] = range.lo <= first ? 0 : range.lo < end ? int(range.lo - first) : Columns;
    seen.hi[i] = range.hi <= first ? 0 : range.hi < end ? int(range.hi - first) : Columns;
  }
  return seen;
}

/// The tiles of columns that a block visits: [begin, end) of each of the heads, counted over the whole batch.
struct TileRange {
  int head_begin, head_end, begin, end;
};

template <int Columns>
__device__ inline TileRange tiles_of(const CollisionPass& p, const RowBlock& block, int rows) {
  const int64_t row_heads = p.row_unit.heads, column_heads = p.column_unit.heads, before = block.batch * column_heads;
  const int64_t hi = seen_by(p, block.first + rows - 1).hi;
  TileRange tiles;
  tiles.begin = int(seen_by(p, block.first).lo / Columns);
  tiles.end = int((hi + Columns - 1) / Columns);
  const int64_t group = p.rows_are_keys ? column_heads / row_heads : 1;
  tiles.head_begin = int(before + (p.rows_are_keys ? block.head * group : block.head / (row_heads / column_heads)));
  tiles.head_end = tiles.begin < tiles.end ? int(tiles.head_begin + group) : tiles.head_begin;
  return tiles;
}

/// The chunks of columns that a block needs, in order, and the ring of stages in which they arrive two ahead of use.
template <class K>
class ColumnStream {
 public:
  __device__ ColumnStream(const CollisionPass& p, int slice, const TileRange& tiles, bfloat16* stages, float* factors)
      : p_(p), tiles_(tiles), stages_(stages), factors_(factors), head_(tiles.head_begin), tile_(tiles.begin) {
    // One chunk of results is all of them: known here, it saves registers.
    unit_chunks_ = K::Gradient && K::Chunks == 1 ? 1 : chunks_of(p.column_unit.width);
    partner_chunks_ = K::Chunks == 1 ? 1 : chunks_of(p.column_partner.width);
    slice_ = K::Chunks == 1 ? 0 : slice * K::Chunks;
    const int left = (K::Gradient ? unit_chunks_ : partner_chunks_) - slice_;
    const int slice_chunks = left < K::Chunks ? left : K::Chunks;
    jobs_ = unit_chunks_ + (K::Gradient ? partner_chunks_ : 0) + (K::Gradient && !K::kReload ? 0 : slice_chunks);
  }

  /// Begins to copy the next chunk, if there is one.
  __device__ void issue() {
    if (head_ < tiles_.head_end) {
      const bool again = K::Gradient && job_ >= unit_chunks_ + partner_chunks_;
      const bool unit = job_ < unit_chunks_ || again;
      const int chunk = job_ < unit_chunks_ ? job_
                        : again             ? slice_ + job_ - unit_chunks_ - partner_chunks_
                                            : job_ - unit_chunks_ + (K::Gradient ? 0 : slice_);
      const int64_t first = int64_t(tile_) * K::kColumns, left = p_.column_unit.seq - first;
      copy_columns_async<K::Parts, K::kColumns>(
          unit ? p_.column_unit : p_.column_partner, head_ * p_.column_unit.seq + first,
          left < K::kColumns ? int(left) : K::kColumns, chunk, stages_ + (issued_ & (K::kStages - 1)) * K::kStageSize);
      if (job_ == 0) copy_factors(first, left);
      if (++job_ == jobs_) {
        job_ = 0, parity_ ^= 1;
        if (++tile_ == tiles_.end) tile_ = tiles_.begin, ++head_;
      }
    }
    ++issued_;
    copy_async_commit();
  }

  /// Waits for the next chunk and returns its stage, which stays for one more call of next().
  __device__ const bfloat16* next() {
    copy_async_wait<1>();
    __syncthreads();
    issue();
    return stages_ + ((issued_ - 3) & (K::kStages - 1)) * K::kStageSize;
  }

 private:
  /// The factors of the tile's columns, in turns to one of two places.
  __device__ void copy_factors(int64_t first, int64_t left) {
    const int i = int(threadIdx.x) * 4;
    if (i >= K::kColumns) return;
    left -= i;
    const float* source = p_.column_unit.factor + head_ * p_.column_unit.factor_pitch + first;
    const int bytes = left <= 0 ? 0 : left < 4 ? int(left) * 4 : 16;
    copy_async16(factors_ + parity_ * K::kColumns + i, source + (bytes ? i : 0), bytes);
  }

  const CollisionPass& p_;
  const TileRange tiles_;
  bfloat16* stages_;
  float* factors_;
  int head_, tile_, unit_chunks_, partner_chunks_, slice_, jobs_;
  int job_ = 0, parity_ = 0, issued_ = 0;
};

}  // namespace subquad::cuda
