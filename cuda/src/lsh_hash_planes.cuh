/// Codes from the signs of projections on tensor cores, which are never stored. A block holds a tile of tokens as f16
/// in shared memory and walks the planes in chunks of 64; a warp multiplies 64 tokens by 32 planes, whose signs are one
/// word of each token's bit string; the thread of a token cuts the string into codes.
///
/// A sign does not change when a row or a plane is scaled by a power of two, so both are brought to a largest number in
/// [2^14, 2^15) and split into f16 parts, high + low with 11 bits each (bf16 and f16 rows need no low part):
/// high high + high low + low high. What is lost is below 4 * 2^-23 |x| |plane|, beside the truncation of the sums.
/// Rows and planes that hold an infinity or NaN are projected by plain sums instead.
///
/// At (32, 9) and D = 64 in bf16 a token is 73.7 kflop of products, 27 cycles of an SM's tensor cores by mma.sync; the
/// other instructions (rows 22, planes 14, signs 25, codes 12 a token and warp) fit beside them at 75 % of the rate.
/// Shared memory: 3 KiB, planes 256 D + 1024 bytes, rows 2 (parts * D + 8) bytes a token: 56 KiB at D = 64 with 256
/// tokens in bf16, two blocks on an SM.
#pragma once
#include "code_stream.cuh"
#include "device/mma.cuh"
#include "lsh_hash.cuh"

namespace subquad::cuda {

static constexpr int kPlaneChunk = 64;
static constexpr int kMaxPlaneTokens = 256;
/// Tokens that a warp multiplies, and warps that share them.
static constexpr int kWarpTokens = 64, kWarpsATokenTile = 2;

/// f16 parts of a row of x.
template <class T>
constexpr int kRowParts = 1;
template <>
constexpr int kRowParts<float> = 2;

/// What lies at the beginning of the shared memory.
struct PlaneScratch {
  HashTile tile;  // here because the products need the registers
  uint32_t words[2][kMaxPlaneTokens];
  int irregular_row[kMaxPlaneTokens];
};

/// A block has as many threads as tokens. A row of f16 parts is its high parts, then its low parts, if it has any.
struct PlaneTile {
  int tokens, columns;         // columns: D rounded up to 16
  int row_pitch, plane_pitch;  // no two of eight rows begin in the same 16 bytes modulo 128
  PlaneScratch* scratch;
  uint16_t* planes;  // [64][plane_pitch]
  uint16_t* rows;    // [tokens][row_pitch]
};

static_assert(sizeof(PlaneScratch) % 16 == 0, "the planes behind it are read 16 bytes at a time");

static inline SUBQUAD_HD PlaneTile size_planes(int tokens, int64_t dim, int row_parts) {
  PlaneTile tile = {};
  tile.tokens = tokens, tile.columns = int(dim + 15) / 16 * 16;
  tile.row_pitch = row_parts * tile.columns + 8, tile.plane_pitch = 2 * tile.columns + 8;
  return tile;
}

static inline size_t plane_shared_bytes(int tokens, int64_t dim, int row_parts) {
  const PlaneTile tile = size_planes(tokens, dim, row_parts);
  return sizeof(PlaneScratch) + 2 * size_t(kPlaneChunk * tile.plane_pitch + tokens * tile.row_pitch);
}

__device__ inline PlaneTile lay_out_planes(char* shared, int tokens, int64_t dim, int row_parts) {
  PlaneTile tile = size_planes(tokens, dim, row_parts);
  tile.scratch = reinterpret_cast<PlaneScratch*>(shared);
  tile.planes = reinterpret_cast<uint16_t*>(shared + sizeof(PlaneScratch));
  tile.rows = tile.planes + kPlaneChunk * tile.plane_pitch;
  return tile;
}

/// Two neighbouring numbers, zeros from `dim` on. `paired` says that both can be read at once.
template <class T>
__device__ inline float2 load_pair(const T* row, int d, int dim, bool paired) {
  if (paired && d < dim) {
    if constexpr (sizeof(T) == 4) {
      return *reinterpret_cast<const float2*>(row + d);
    } else {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(row + d);
      return {to_float(T{uint16_t(word)}), to_float(T{uint16_t(word >> 16)})};
    }
  }
  return {d < dim ? to_float(row[d]) : 0.0f, d + 1 < dim ? to_float(row[d + 1]) : 0.0f};
}

/// Rows that a warp splits at once, so that their loads overlap: kNumbers numbers in all, kSpan columns a row.
template <int kNumbers, int kSpan, class T>
struct RowBatch {
  static constexpr int kRows = kNumbers / kSpan, kPairs = kSpan / (2 * kWarp);
  float2 value[kRows][kPairs];

  /// A row that does not exist has dim 0.
  __device__ void load(int r, const T* row, int dim, bool paired) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) value[r][i] = load_pair(row, 2 * (lane_id() + kWarp * i), dim, paired);
  }

  /// Writes row r as f16 parts, scaled. True if it holds an infinity or NaN.
  template <int kParts>
  __device__ bool split(int r, int columns, uint16_t* parts) const {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      largest =
          max(largest, max(float_to_bits(value[r][i].x) & 0x7fffffffu, float_to_bits(value[r][i].y) & 0x7fffffffu));
    largest = __reduce_max_sync(kFullMask, largest);
    // 2^14 over the largest number's power of two, as far as that is a float.
    const float scale = bits_to_float(unsigned(min(127, 141 - int(largest >> 23)) + 127) << 23);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int d = 2 * (lane_id() + kWarp * i);
      if (d >= columns) break;
      const float x = value[r][i].x * scale, y = value[r][i].y * scale;
      // Rounded to the 11 bits of f16; numbers of 16 bits have no more.
      const float x_high = kParts == 1 ? x : bits_to_float((float_to_bits(x) + 0x1000u) & 0xffffe000u);
      const float y_high = kParts == 1 ? y : bits_to_float((float_to_bits(y) + 0x1000u) & 0xffffe000u);
      *reinterpret_cast<uint32_t*>(parts + d) = pack(x_high, y_high, half{});
      if (kParts == 2) *reinterpret_cast<uint32_t*>(parts + columns + d) = pack(x - x_high, y - y_high, half{});
    }
    return largest >= 0x7f800000u;
  }
};

template <class T>
__device__ inline bool can_pair(const T* data, int64_t stride, int64_t other_stride, int64_t dim) {
  return reinterpret_cast<uintptr_t>(data) % (2 * sizeof(T)) == 0 && (stride | other_stride | dim) % 2 == 0;
}

template <int kSpan, class T>
__device__ inline void stage_tokens(const LshHashArgs& args, const T* x, int count, const PlaneTile& shared) {
  using Batch = RowBatch<512, kSpan, T>;
  const bool paired = can_pair(x, args.x.stride[2], 0, args.dim);
  for (int first = warp_id() * Batch::kRows; first < shared.tokens; first += shared.tokens / kWarp * Batch::kRows) {
    Batch batch;
#pragma unroll
    for (int r = 0; r < Batch::kRows; ++r)
      batch.load(r, x + (first + r) * args.x.stride[2], first + r < count ? int(args.dim) : 0, paired);
#pragma unroll
    for (int r = 0; r < Batch::kRows; ++r) {
      const bool irregular =
          batch.template split<kRowParts<T>>(r, shared.columns, shared.rows + (first + r) * shared.row_pitch);
      if (lane_id() == 0) shared.scratch->irregular_row[first + r] = irregular;
    }
  }
}

/// Where the plane of bit `bit` of a word lies among 32: a lane's sums, two of every eight, are then eight
/// neighbouring bits.
__device__ inline int plane_slot(int bit) { return bit % 8 / 2 * 8 + bit / 8 * 2 + bit % 2; }

/// Planes first ... first + 63 of the flat order. True if the warp has met an irregular one.
template <int kSpan>
__device__ inline bool stage_planes(const LshHashArgs& args, const float* planes, const PlaneTile& shared,
                                    uint32_t first, uint32_t bits) {
  using Batch = RowBatch<256, kSpan, float>;
  bool any = false;
  for (int p = warp_id() * Batch::kRows; p < kPlaneChunk; p += shared.tokens / kWarp * Batch::kRows) {
    const uint32_t hash_bits = uint32_t(args.hash_bits), hash = (first + p) / hash_bits;
    int j = int(first + p - hash * hash_bits);
    const float* plane = planes + hash * args.planes.stride[1] + j * args.planes.stride[2];
    const bool paired = can_pair(planes, args.planes.stride[1], args.planes.stride[2], args.dim);
    Batch batch;
#pragma unroll
    for (int r = 0; r < Batch::kRows; ++r) {
      batch.load(r, plane, first + p + r < bits ? int(args.dim) : 0, paired);
      plane += args.planes.stride[2];
      if (++j == args.hash_bits) plane += args.planes.stride[1] - j * args.planes.stride[2], j = 0;
    }
#pragma unroll
    for (int r = 0; r < Batch::kRows; ++r) {
      const int slot = (p + r) / 32 * 32 + plane_slot((p + r) % 32);
      any |= batch.template split<2>(r, shared.columns, shared.planes + slot * shared.plane_pitch);
    }
  }
  return any;
}

/// Both for any width: the span of a batch is the next of 64, 128 and 256.
template <class T>
__device__ inline void stage_tokens(const LshHashArgs& args, const T* x, int count, const PlaneTile& shared) {
  if (shared.columns <= 64)
    stage_tokens<64, T>(args, x, count, shared);
  else if (shared.columns <= 128)
    stage_tokens<128, T>(args, x, count, shared);
  else
    stage_tokens<256, T>(args, x, count, shared);
}

__device__ inline bool stage_planes(const LshHashArgs& args, const float* planes, const PlaneTile& shared,
                                    uint32_t first, uint32_t bits) {
  return shared.columns <= 64    ? stage_planes<64>(args, planes, shared, first, bits)
         : shared.columns <= 128 ? stage_planes<128>(args, planes, shared, first, bits)
                                 : stage_planes<256>(args, planes, shared, first, bits);
}

/// Fragments of 16 rows and 16 columns (tokens), or of twice 8 rows and 16 columns (planes).
__device__ inline void load_tokens(uint32_t (&a)[4], const uint16_t* rows, int pitch) {
  ldmatrix_x4<false>(a, rows + lane_id() % 16 * pitch + lane_id() / 16 * 8);
}
__device__ inline void load_planes(uint32_t (&b)[4], const uint16_t* rows, int pitch) {
  ldmatrix_x4<false>(b, rows + (lane_id() % 8 + lane_id() / 16 * 8) * pitch + lane_id() / 8 % 2 * 8);
}

/// Projections of 64 tokens to 32 planes.
template <int kParts>
__device__ inline void project(float (&sums)[4][4][4], const PlaneTile& shared, int first_token, int first_plane) {
  const uint16_t* rows = shared.rows + first_token * shared.row_pitch;
  const uint16_t* planes = shared.planes + first_plane * shared.plane_pitch;
#pragma unroll 1
  for (int k = 0; k < shared.columns; k += 16, rows += 16, planes += 16) {
    uint32_t high[4][2], low[4][2];
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t b[4];
      load_planes(b, planes + 8 * n * shared.plane_pitch, shared.plane_pitch);
      high[n][0] = b[0], high[n][1] = b[1], high[n + 1][0] = b[2], high[n + 1][1] = b[3];
      load_planes(b, planes + 8 * n * shared.plane_pitch + shared.columns, shared.plane_pitch);
      low[n][0] = b[0], low[n][1] = b[1], low[n + 1][0] = b[2], low[n + 1][1] = b[3];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a[4];
      if constexpr (kParts == 2) {
        load_tokens(a, rows + 16 * m * shared.row_pitch + shared.columns, shared.row_pitch);
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_m16n8k16(sums[m][n], a, high[n], half{});
      }
      load_tokens(a, rows + 16 * m * shared.row_pitch, shared.row_pitch);
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_m16n8k16(sums[m][n], a, low[n], half{});
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_m16n8k16(sums[m][n], a, high[n], half{});
    }
  }
}

/// The words of the warp's 64 tokens: four lanes have a byte each of a token's word. Its bits are the sign bits of
/// 0 - sum, which mean nothing for NaN; but those are irregular.
__device__ inline void store_words(const float (&sums)[4][4][4], uint32_t* words) {
  const int group = lane_id() / 4, member = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 7; i >= 0; --i)
        bits = __funnelshift_r(float_to_bits(0.0f - sums[m][i / 2][2 * row + i % 2]), bits, 31);
      reinterpret_cast<uint8_t*>(words + 16 * m + 8 * row + group)[member] = uint8_t(bits);
    }
}

__device__ inline const float* planes_of(const LshHashArgs& args, const HashTile& tile) {
  return static_cast<const float*>(args.planes.data) + plane_head_of(args, tile) * args.planes.stride[0];
}

/// All codes of the thread's token by plain sums, in the order of the CPU.
template <class T>
__device__ inline void hash_plainly(const LshHashArgs& args, const HashTile& tile) {
  const int token = int(threadIdx.x);
  const T* row = rows_of<T>(args, tile) + token * args.x.stride[2];
  const float* planes = planes_of(args, tile);
  const CodeColumn column = codes_of(args, tile, token);
  float largest = 0;
#pragma unroll 1
  for (int64_t d = 0; d < args.dim; ++d) largest = fmaxf(largest, fabsf(to_float(row[d])));
  const float factor = rescue_factor(largest);
  for (int32_t r = 0; r < args.num_hashes; ++r) {
    uint32_t code = 0;
    for (int j = 0; j < args.hash_bits; ++j) {
      const float* plane = planes + r * args.planes.stride[1] + j * args.planes.stride[2];
      float sum = 0;
#pragma unroll 1
      for (int64_t d = 0; d < args.dim; ++d) sum = fmaf(plane[d], to_float(row[d]) * factor, sum);
      code |= uint32_t(sum > 0) << j;
    }
    column.store(r, code);
  }
}

/// The thread's codes of a chunk. `pending` are the bits behind the last whole code before it.
__device__ inline uint32_t push_words(const LshHashArgs& args, const PlaneScratch& scratch, uint32_t first,
                                      uint32_t pending) {
  const int token = int(threadIdx.x);
  if (token >= scratch.tile.count) return 0;
  const uint32_t done = first / uint32_t(args.hash_bits);
  CodeStream codes(codes_of(args, scratch.tile, token), args.hash_bits, int32_t(done), args.num_hashes);
  codes.pending = pending, codes.filled = int(first - done * uint32_t(args.hash_bits));
  codes.push(scratch.words[0][token]);
  codes.push(scratch.words[1][token]);
  return codes.pending;
}

template <class T>
__device__ inline void hash_with_planes(const LshHashArgs& args, const HashTile& tile, const PlaneTile& shared) {
  const uint32_t bits = uint32_t(args.num_hashes) * uint32_t(args.hash_bits);
  const float* planes = planes_of(args, tile);
  stage_tokens(args, rows_of<T>(args, tile), tile.count, shared);
  if (threadIdx.x == 0) shared.scratch->tile = tile;
  uint32_t pending = 0;
  bool irregular_plane = false;
  for (uint32_t first = 0; first < bits; first += kPlaneChunk) {
    irregular_plane |= bool(__syncthreads_or(stage_planes(args, planes, shared, first, bits)));
    const int first_token = warp_id() / kWarpsATokenTile * kWarpTokens, word = warp_id() % kWarpsATokenTile;
    float sums[4][4][4] = {};
    project<kRowParts<T>>(sums, shared, first_token, 32 * word);
    store_words(sums, shared.scratch->words[word] + first_token);
    __syncthreads();
    pending = push_words(args, *shared.scratch, first, pending);
  }
  const int token = int(threadIdx.x);
  if (token < shared.scratch->tile.count && (irregular_plane || shared.scratch->irregular_row[token]))
    hash_plainly<T>(args, shared.scratch->tile);
}

template <class T>
__global__ void __launch_bounds__(kMaxPlaneTokens, 2)
    planes_kernel(const __grid_constant__ LshHashArgs args, int64_t tiles_before) {
  const PlaneTile shared = lay_out_planes(dynamic_shared<char>(), int(blockDim.x), args.dim, kRowParts<T>);
  const HashTile tile = hash_tile(args, tiles_before, shared.tokens);
  hash_with_planes<T>(args, tile, shared);
}

}  // namespace subquad::cuda
