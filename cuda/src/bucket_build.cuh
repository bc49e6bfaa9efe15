/// Tables of bucket_attention, first half: T[pair, hash, slice, bucket, column] = sum of the rows of a bucket.
///
/// A warp owns 16 buckets of a hash and holds their sums in registers, lanes as columns (2 or 1 each): 32 warps own 512
/// buckets of one hash, 256 of two, or 128 of four. A block reads the sources of all heads of the group in order, a
/// tile at a time; the next tile is copied to shared memory meanwhile. A warp lists the tile's tokens of its own
/// buckets by ballots, takes 32 of them at once, and adds their rows bucket by bucket. So sums are in token order,
/// nothing collides, no atomic is needed, and one bucket's NaN leaves the others alone.
///
/// A token and hash of 64 bf16 columns cost 2.7 wavefronts of shared memory (row, shuffle, and the rest for the lists)
/// and 29 instructions of a warp (13 for the row, 9 for the list, 4 for finding the bucket, 3 for the copies): for 96
/// heads of 16384 tokens and 16 hashes of 8 bits 25e6 of them take 0.8 ms on an H200, where instruction issue is the
/// limit. With 9 bits lists and buckets cost twice as much. Rows are read once for every 2 hashes, 1.6 GB from L2,
/// which hide behind it. Shared memory: 84 KiB at 256 buckets; one block of 32 warps on an SM.
#pragma once
#include "bucket_codes.cuh"
#include "device/async_copy.cuh"

namespace subquad::cuda {

static constexpr int kSlice = 32;       // columns of a piece of a table
static constexpr int kOwnBuckets = 16;  // of a warp
static constexpr int kBuildWarps = 32;  // of a block, at most
static constexpr int kBuildHashes = 4;  // of a block, at most
static constexpr int kStagedCodes = 2;  // of a thread, at most
static constexpr int32_t kNoBucket = 0xffff;

/// Tokens of a tile: 32 KiB of rows of 64 columns.
template <class T>
static constexpr int kBuildTile = 512 / int(sizeof(T));

/// Neighbouring elements of a row, read or written at once.
template <int Width, class T>
struct alignas(Width * sizeof(T)) Packed {
  T value[Width];
};

/// Tables of `pairs` (batch, kv head) from `first_pair` on. Every piece [bucket, column] has a row of zeros more, which
/// stands for the bucket of a token without one.
struct TablesArgs {
  BucketProblem problem;
  float* tables;
  int64_t first_pair, pairs, slices;
  int hashes, groups;    // build: of a block; groups are of kOwnBuckets, a warp each
  int64_t group_blocks;  // build: blocks that share the buckets of a hash
  int chunks;            // gather: targets of a thread / kGatherChunk
  int64_t tiles;         // gather: of the targets of a pair
  bool vectors;          // build: rows are aligned to 16 bytes; gather: rows of the output to 4 elements
};

__host__ __device__ inline int64_t piece_floats(const BucketProblem& p) { return (p.num_buckets + 1) * kSlice; }

__device__ inline float* table_piece(const TablesArgs& a, int64_t pair, int64_t hash, int64_t slice) {
  return a.tables + ((pair * a.problem.num_hashes + hash) * a.slices + slice) * piece_floats(a.problem);
}

/// Bytes of shared memory of a building block.
template <int Columns, class T>
int64_t build_shared_bytes(int hashes, int groups) {
  return kBuildTile<T> * int64_t(2 * Columns * sizeof(T) + (2 + groups) * hashes * sizeof(uint16_t));
}

/// What a block works on, and where its head's first row and codes are. Kept in shared memory to save registers.
struct BuildBlock {
  int64_t pair, hash, column;
  int64_t rows, codes, batch;
  int group;
};

template <int Columns>
__device__ inline BuildBlock build_block(const TablesArgs& a) {
  const BucketProblem& p = a.problem;
  const int64_t column_blocks = (p.dim + Columns - 1) / Columns;
  const int64_t hash_blocks = (p.num_hashes + a.hashes - 1) / a.hashes;
  const int64_t column = blockIdx.x % column_blocks * Columns, hash_block = blockIdx.x / column_blocks / a.group_blocks;
  const int64_t hash = hash_block % hash_blocks * a.hashes, pair = hash_block / hash_blocks;
  const int64_t b = (a.first_pair + pair) / p.heads_kv, head = (a.first_pair + pair) % p.heads_kv * p.sources.group;
  return {pair,
          hash,
          column,
          row_offset(p.rows, b, head, 0) + column,
          row_offset(p.sources.codes, b, head, hash),
          b,
          int(blockIdx.x / column_blocks % a.group_blocks) * a.groups};
}

/// The tile of sources that a block reads next.
struct SourceTile {
  int64_t head, first;
};

/// Begins to copy the rows of a tile. Rows behind the last token stay as they are: nobody asks for them.
template <int Columns, class T>
__device__ inline void copy_rows(const TablesArgs& a, const BuildBlock& block, SourceTile tile, T* to) {
  constexpr int kPiece = 16 / int(sizeof(T)), kPieces = Columns / kPiece;
  const BucketProblem& p = a.problem;
  const int tokens = int(min(p.sources.tokens - tile.first, int64_t(kBuildTile<T>)));
  const int columns = int(min(p.dim - block.column, int64_t(Columns)));
  const T* from =
      static_cast<const T*>(p.rows.data) + block.rows + tile.head * p.rows.stride[1] + tile.first * p.rows.stride[2];
  if (a.vectors) {
    for (int i = int(threadIdx.x); i < tokens * kPieces; i += int(blockDim.x)) {
      const int column = i % kPieces * kPiece, left = max(columns - column, 0);
      copy_async16(to + i * kPiece, from + i / kPieces * p.rows.stride[2] + (left ? column : 0),
                   min(left * int(sizeof(T)), 16));
    }
  } else {
    for (int i = int(threadIdx.x); i < tokens * Columns; i += int(blockDim.x))
      to[i] = i % Columns < columns ? from[i / Columns * p.rows.stride[2] + i % Columns] : T{};
  }
}

/// Codes of a tile, [hash, token], on their way to shared memory.
template <class T>
struct TileCodes {
  RawCode raw[kStagedCodes];

  __device__ void load(const TablesArgs& a, const BuildBlock& block, SourceTile tile) {
    const BucketProblem& p = a.problem;
    const Operand& codes = p.sources.codes;
#pragma unroll
    for (int c = 0; c < kStagedCodes; ++c) {
      const int i = c * int(blockDim.x) + int(threadIdx.x), hash = i / kBuildTile<T>;
      const int64_t token = tile.first + i % kBuildTile<T>;
      raw[c] = {0, false};
      if (hash < a.hashes && block.hash + hash < p.num_hashes && token < p.sources.tokens)
        raw[c] = {load_code(codes, block.codes + tile.head * codes.stride[1] + hash * codes.stride[2] + token),
                  is_kept(p.sources.mask, block.batch, token)};
    }
  }
  __device__ void store(const TablesArgs& a, uint16_t* to) const {
#pragma unroll
    for (int c = 0; c < kStagedCodes; ++c) {
      const int i = c * int(blockDim.x) + int(threadIdx.x);
      if (i < a.hashes * kBuildTile<T>) to[i] = uint16_t(code_or(raw[c], a.problem.num_buckets, kNoBucket));
    }
  }
};

/// The sums of a warp's buckets, `Width` columns a lane.
template <int Width>
struct OwnSums {
  float value[kOwnBuckets][Width] = {};
};

/// Lists the tile's tokens of a warp's buckets, token * kOwnBuckets + bucket, and returns how many there are.
template <class T>
__device__ inline int list_tokens(const uint16_t* codes, int group, uint16_t* list) {
  const unsigned below = (1u << lane_id()) - 1;
  int count = 0;
  for (int token = lane_id(); token < kBuildTile<T>; token += kWarp) {
    const int code = codes[token];
    const bool own = code / kOwnBuckets == group;
    const unsigned all = __ballot_sync(kFullMask, own);
    uint16_t* place = list + count + __popc(all & below);
    const uint16_t entry = uint16_t(token * kOwnBuckets + code % kOwnBuckets);
    if (own) *place = entry;
    count += __popc(all);
  }
  __syncwarp();
  return count;
}

/// Adds the rows of the listed tokens, 32 at a time and of those bucket by bucket, so that the sums stay in registers.
template <int Width, class T>
__device__ inline void add_rows(const T* rows, const uint16_t* list, int count, OwnSums<Width>& sums) {
  using Piece = Packed<Width, T>;
  const char* columns = reinterpret_cast<const char*>(rows) + lane_id() * int(sizeof(Piece));
  for (int first = 0; first < count; first += kWarp) {
    // The highest bit is the cheapest to find, so that lane 31 has the first token.
    const int i = first + kWarp - 1 - lane_id(), entry = i < count ? list[i] : 0;
    const int bucket = i < count ? entry % kOwnBuckets : kOwnBuckets,
              place = entry / kOwnBuckets * kWarp * int(sizeof(Piece));
#pragma unroll
    for (int b = 0; b < kOwnBuckets; ++b)
      for (unsigned left = __ballot_sync(kFullMask, bucket == b); left;) {
        const int lane = kWarp - 1 - __clz(int(left));
        left ^= 1u << lane;
        const Piece piece = *reinterpret_cast<const Piece*>(columns + __shfl_sync(kFullMask, place, lane));
#pragma unroll
        for (int j = 0; j < Width; ++j) sums.value[b][j] += to_float(piece.value[j]);
      }
  }
}

/// Writes a warp's buckets, and with those of the first group the row of zeros behind all of them.
template <int Width>
__device__ inline void write_sums(const TablesArgs& a, const BuildBlock& block, int64_t hash, int group,
                                  const OwnSums<Width>& sums) {
  const int column = int(block.column) + lane_id() * Width, buckets = int(a.problem.num_buckets);
  if (hash >= a.problem.num_hashes || column / kSlice >= a.slices) return;
  float* piece = table_piece(a, block.pair, hash, column / kSlice) + column % kSlice;
  Packed<Width, float> row;
#pragma unroll
  for (int i = 0; i < kOwnBuckets; ++i) {
    const int bucket = group * kOwnBuckets + i;
#pragma unroll
    for (int j = 0; j < Width; ++j) row.value[j] = sums.value[i][j];
    if (bucket < buckets) *reinterpret_cast<Packed<Width, float>*>(piece + bucket * kSlice) = row;
  }
  if (group == 0) *reinterpret_cast<Packed<Width, float>*>(piece + buckets * kSlice) = {};
}

template <int Columns, class T>
__global__ void __launch_bounds__(kBuildWarps* kWarp) build_tables_kernel(const __grid_constant__ TablesArgs args) {
  constexpr int kWidth = Columns / kWarp, kRows = kBuildTile<T> * Columns;
  __shared__ BuildBlock block;
  const BucketProblem& p = args.problem;
  T* rows = dynamic_shared<T>();                                    // [2, token, column]
  uint16_t* codes = reinterpret_cast<uint16_t*>(rows + 2 * kRows);  // [2, hash, token]
  uint16_t* list = codes + 2 * args.hashes * kBuildTile<T> + warp_id() * kBuildTile<T>;
  if (threadIdx.x == 0) block = build_block<Columns>(args);
  __syncthreads();
  const int all_codes = args.hashes * kBuildTile<T>;
  const int hash = warp_id() / args.groups, group = block.group + warp_id() % args.groups;
  // Warps behind the last bucket of the last hash only help to copy.
  const bool owns = hash < args.hashes;
  SourceTile tile = {0, 0};
  OwnSums<kWidth> sums;
  TileCodes<T> next;
  copy_rows<Columns>(args, block, tile, rows);
  copy_async_commit();
  next.load(args, block, tile);
  next.store(args, codes);
  bool more = true;
  for (int buffer = 0; more; buffer ^= 1) {
    tile.first += kBuildTile<T>;
    if (tile.first >= p.sources.tokens) tile.first = 0, ++tile.head;
    more = tile.head < p.sources.group;
    // The tile has arrived, and all warps are done with the other buffer.
    copy_async_wait<0>();
    __syncthreads();
    if (more) {
      copy_rows<Columns>(args, block, tile, rows + (buffer ^ 1) * kRows);
      copy_async_commit();
      next.load(args, block, tile);
    }
    if (owns) {
      const int count = list_tokens<T>(codes + buffer * all_codes + hash * kBuildTile<T>, group, list);
      add_rows(rows + buffer * kRows, list, count, sums);
    }
    if (more) next.store(args, codes + (buffer ^ 1) * all_codes);
  }
  if (owns) write_sums(args, block, block.hash + hash, group, sums);
}

}  // namespace subquad::cuda
