/// Tables of bucket_attention, second half: out[t] = scale * sum_r T[r, code of t].
///
/// A block owns 32 columns of up to 1536 targets of a (batch, kv head), of all heads of the group, with their sums in
/// registers: 8 lanes share a target, 4 columns each, and a thread has 8 to 24 targets. It goes through the hashes; a
/// hash's piece of the table and the codes are copied to shared memory while the hash before it is added. Where that
/// pays less than reading the rows one by one (few targets, or tables too large for two in shared memory), rows are
/// read from L2.
///
/// A target and hash of 64 columns cost 2.1 wavefronts of shared memory and 3.5 instructions of a warp, the copies add
/// a fifth: for 96 heads of 16384 tokens and 16 hashes of 8 bits 0.28 ms on an H200, where wavefronts are the limit,
/// and 1.1 GB from L2 in 0.2 ms behind them. Shared memory: 82 KiB at 256 buckets, 146 KiB at 512; one block on an SM.
#pragma once
#include "bucket_build.cuh"

namespace subquad::cuda {

static constexpr int kGatherThreads = 512;
static constexpr int kGatherLanes = 8;   // of a target
static constexpr int kGatherChunk = 8;   // targets of a thread whose codes are read at once
static constexpr int kGatherChunks = 3;  // of a thread, at most
static constexpr int kGatherGroups = kGatherThreads / kGatherLanes;
static constexpr int kGatherTargets = kGatherGroups * kGatherChunk;  // of a block, for every chunk
static constexpr int64_t kMostStagedBuckets = 512;
static constexpr int64_t kNowhere = INT64_MIN;  // the place of the codes of a masked target

static_assert(kGatherTargets == kGatherThreads, "a thread stages one code of every chunk");

/// Bytes of shared memory of a gathering block.
inline int64_t gather_shared_bytes(const BucketProblem& p, int chunks, bool direct) {
  return chunks * int64_t(kGatherTargets) * int64_t(2 * sizeof(int64_t) + 2 * sizeof(uint16_t)) +
         (direct ? 0 : 2 * piece_floats(p) * int64_t(sizeof(float)));
}

/// What a block works on: `count` targets of a pair, and where the first hash's piece of the table is.
struct GatherBlock {
  const float* piece;
  int piece_step;  // to the next hash
  int column, count;
};

/// Fills in where the codes and the rows of the block's targets are. Targets are numbered through all heads of a group.
__device__ inline GatherBlock gather_block(const TablesArgs& a, int64_t* codes, int64_t* rows) {
  const BucketProblem& p = a.problem;
  const int64_t rest = int64_t(blockIdx.x) / a.tiles, pair = rest / a.slices, slice = rest % a.slices;
  const int64_t b = (a.first_pair + pair) / p.heads_kv, head_kv = (a.first_pair + pair) % p.heads_kv;
  const int64_t most = int64_t(a.chunks) * kGatherTargets, first = blockIdx.x % a.tiles * most;
  const int count = int(min(most, p.targets.group * p.targets.tokens - first));
  for (int i = int(threadIdx.x); i < count; i += kGatherThreads) {
    const int64_t head = head_kv * p.targets.group + (first + i) / p.targets.tokens;
    const int64_t token = (first + i) % p.targets.tokens;
    const bool keep = is_kept(p.targets.mask, b, token);
    codes[i] = keep ? row_offset(p.targets.codes, b, head, 0) + token : kNowhere;
    rows[i] = row_offset(p.out, b, head, token);
  }
  return {table_piece(a, pair, 0, slice), int(a.slices * piece_floats(p)), int(slice) * kSlice, count};
}

__device__ inline void copy_piece(const float* from, float* to, int floats) {
  for (int i = int(threadIdx.x) * 4; i < floats; i += kGatherThreads * 4) copy_async16(to + i, from + i);
}

/// Codes of a hash on their way to shared memory. The bucket behind the last one stands for none; `places` are where
/// the codes of hash 0 are, or kNowhere.
template <int Chunks>
struct StagedCodes {
  int32_t raw[Chunks];

  __device__ void load(const TablesArgs& a, const GatherBlock& block, const int64_t* places, int64_t hash) {
    const Operand& codes = a.problem.targets.codes;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int target = c * kGatherThreads + int(threadIdx.x);
      const int64_t place = target < block.count ? places[target] : kNowhere;
      raw[c] = -1;
      if (place != kNowhere) raw[c] = load_code(codes, place + hash * codes.stride[2]);
    }
  }
  __device__ void store(const TablesArgs& a, uint16_t* to) const {
    const int64_t buckets = a.problem.num_buckets;
#pragma unroll
    for (int c = 0; c < Chunks; ++c)
      if (c < a.chunks)
        to[c * kGatherThreads + threadIdx.x] = uint16_t(code_or({raw[c], true}, buckets, int32_t(buckets)));
  }
};

/// Four columns of the targets of a thread.
template <int Chunks>
struct GatherSums {
  float value[Chunks][kGatherChunk][4] = {};

  __device__ void add(const GatherBlock& block, const float* piece, const uint16_t* codes) {
    const int group = int(threadIdx.x) / kGatherLanes;
    const float* columns = piece + threadIdx.x % kGatherLanes * 4;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (c * kGatherTargets >= block.count) break;
      const uint4 packed = *reinterpret_cast<const uint4*>(codes + c * kGatherTargets + group * kGatherChunk);
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < kGatherChunk; ++i) {
        const int code = int(words[i / 2] >> i % 2 * 16 & 0xffffu);
        const float4 x = *reinterpret_cast<const float4*>(columns + code * kSlice);
        value[c][i][0] += x.x, value[c][i][1] += x.y, value[c][i][2] += x.z, value[c][i][3] += x.w;
      }
    }
  }
};

template <int Chunks, class Out>
__device__ inline void write_targets(const TablesArgs& a, const GatherBlock& block, const GatherSums<Chunks>& sums,
                                     const int64_t* places) {
  const BucketProblem& p = a.problem;
  const int group = int(threadIdx.x) / kGatherLanes;
  const int column = block.column + int(threadIdx.x) % kGatherLanes * 4, columns = int(p.dim) - column;
#pragma unroll
  for (int c = 0; c < Chunks; ++c)
#pragma unroll
    for (int i = 0; i < kGatherChunk; ++i) {
      const int target = c * kGatherTargets + group * kGatherChunk + i;
      if (target >= block.count) return;
      Packed<4, Out> row;
#pragma unroll
      for (int j = 0; j < 4; ++j) from_float(sums.value[c][i][j] * p.scale, &row.value[j]);
      Out* to = static_cast<Out*>(p.out.data) + places[target] + column;
      if (a.vectors && columns >= 4) {
        *reinterpret_cast<Packed<4, Out>*>(to) = row;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j < columns) to[j] = row.value[j];
      }
    }
}

/// Direct: rows of the tables are read where they are.
template <bool Direct, class Out>
__global__ void __launch_bounds__(kGatherThreads) gather_tables_kernel(const __grid_constant__ TablesArgs args) {
  constexpr int kChunks = Direct ? 1 : kGatherChunks;
  const BucketProblem& p = args.problem;
  const int piece = int(piece_floats(p)), staged = args.chunks * kGatherTargets, hashes = int(p.num_hashes);
  float* pieces = dynamic_shared<float>();  // [2, bucket, column]
  int64_t* places = reinterpret_cast<int64_t*>(pieces + (Direct ? 0 : 2 * piece));
  int64_t* rows = places + staged;
  uint16_t* codes = reinterpret_cast<uint16_t*>(rows + staged);  // [2, target]
  const GatherBlock block = gather_block(args, places, rows);
  const float* table = block.piece;
  StagedCodes<kChunks> next;
  if (hashes > 0) {
    if (!Direct) copy_piece(table, pieces, piece);
    next.load(args, block, places, 0);
    next.store(args, codes);
  }
  copy_async_commit();
  GatherSums<kChunks> sums;
  for (int hash = 0; hash < hashes; ++hash) {
    const int buffer = hash & 1, other = buffer ^ 1;
    const bool more = hash + 1 < hashes;
    // The hash has arrived, and all warps are done with the other buffers.
    copy_async_wait<0>();
    __syncthreads();
    if (more) {
      if (!Direct) copy_piece(table + block.piece_step, pieces + other * piece, piece);
      copy_async_commit();
      next.load(args, block, places, hash + 1);
    }
    sums.add(block, Direct ? table : pieces + buffer * piece, codes + buffer * staged);
    if (more) next.store(args, codes + other * staged);
    table += block.piece_step;
  }
  __syncthreads();
  write_targets<kChunks, Out>(args, block, sums, rows);
}

}  // namespace subquad::cuda
