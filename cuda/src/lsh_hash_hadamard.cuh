/// Codes from the signs of y_p = W S[2,p] W S[1,p] W S[0,p] x. A block owns a tile of tokens; one thread (two for 256
/// coordinates) holds all coordinates of a token in registers, so that butterflies need no step across lanes.
///
/// Signs cost no instruction: a block of coordinates carries the sign of its first one, so a butterfly of neighbouring
/// blocks is a + r b and a - r b with one factor r = +1 or -1, an exact product, and one sign is left per transform.
/// A transform of 64 coordinates is 1152 fused additions, 64 more to take the sign out and 64 shifts that collect the
/// bits of y > 0; its 192 factors are broadcast from shared memory. At (16, 8) and D = 64 in bf16 the compiled kernel
/// executes about 3700 instructions a token: 29 cycles of an SM for each, beside 17 of its shared memory and 160 bytes
/// of DRAM (6 cycles), so the instruction rate bounds it; 80 % of that is 36 cycles.
/// Shared memory: the rows as floats, (D2 + 4) * 512 bytes (half of it for D2 = 256); of up to 2048 / D2 transforms, or
/// as many as the device has room for, the factors, 12 bytes a coordinate, and the sign words, 4 bytes a token and 32
/// coordinates: 38 KiB for (16, 8), D = 64.
#pragma once
#include "code_stream.cuh"
#include "lsh_hash.cuh"

namespace subquad::cuda {

static constexpr int kHadamardThreads = 128;
/// Coordinates of the most transforms that are in shared memory at once.
static constexpr int kHadamardGroup = 2048;

/// The shared memory of a block, for transforms first ... first + count - 1.
struct HadamardGroup {
  float* rows;      // [tokens][pitch]
  float* factors;   // [count][3][padded] in the order of their use
  float* last;      // [count][4], per thread of a token: the sign that its coordinates carry at the end
  uint32_t* words;  // [count][padded / 32][tokens], the bits y > 0
  int first, count, capacity;
};

/// kCount coordinates a thread, kSplit threads a token.
template <int kCount, int kSplit>
struct HadamardShape {
  static constexpr int kPadded = kCount * kSplit;
  static constexpr int kTokens = kHadamardThreads / kSplit;
  // Rows begin 16 bytes apart modulo 128: eight threads reading 16 bytes each of their own rows touch all banks once.
  static constexpr int kPitch = kPadded + 4;
  static constexpr int kWords = kPadded / 32;
  static constexpr int kRowBytes = 4 * kTokens * kPitch, kTransformBytes = 4 * (3 * kPadded + 4 + kWords * kTokens);

  /// Transforms that are in shared memory at once.
  static int capacity(int parts, int64_t most_shared) {
    constexpr int kMost = kHadamardGroup / kPadded;
    const int64_t fit = (most_shared - kRowBytes) / kTransformBytes, most = fit < 1 ? 1 : fit < kMost ? fit : kMost;
    return parts < most ? parts : int(most);
  }
  static size_t shared_bytes(int capacity) { return size_t(kRowBytes + capacity * kTransformBytes); }
  static __device__ HadamardGroup lay_out(float* shared, int capacity) {
    HadamardGroup group = {};
    group.rows = shared;
    group.factors = group.rows + kTokens * kPitch;
    group.last = group.factors + capacity * 3 * kPadded;
    group.words = reinterpret_cast<uint32_t*>(group.last + capacity * 4);
    group.capacity = capacity;
    return group;
  }
};

/// Sixteen bytes of x as floats.
template <class T>
__device__ inline void unpack(uint4 vector, float* x) {
  const uint32_t word[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4)
      x[i] = bits_to_float(word[i]);
    else
      x[2 * i] = to_float(T{uint16_t(word[i])}), x[2 * i + 1] = to_float(T{uint16_t(word[i] >> 16)});
}

/// Rows of x to shared memory, zeros behind their ends and behind the last row.
template <class Shape, class T>
__device__ inline void stage_rows(const LshHashArgs& args, const HashTile& tile, float* rows) {
  const T* x = rows_of<T>(args, tile);
  const int64_t stride = args.x.stride[2];
  constexpr int kVector = 16 / sizeof(T), kVectors = Shape::kPadded / kVector;
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride % kVector == 0 && args.dim % kVector == 0) {
#pragma unroll 4
    for (int i = int(threadIdx.x); i < Shape::kTokens * kVectors; i += kHadamardThreads) {
      const int token = i / kVectors, d = i % kVectors * kVector;
      uint4 vector = make_uint4(0, 0, 0, 0);
      if (token < tile.count && d < args.dim) vector = *reinterpret_cast<const uint4*>(x + token * stride + d);
      float value[kVector];
      unpack<T>(vector, value);
#pragma unroll
      for (int k = 0; k < kVector; k += 4)
        *reinterpret_cast<float4*>(rows + token * Shape::kPitch + d + k) =
            make_float4(value[k], value[k + 1], value[k + 2], value[k + 3]);
    }
  } else {
    for (int i = int(threadIdx.x); i < Shape::kTokens * Shape::kPadded; i += kHadamardThreads) {
      const int token = i / Shape::kPadded, d = i % Shape::kPadded;
      rows[token * Shape::kPitch + d] = token < tile.count && d < args.dim ? to_float(x[token * stride + d]) : 0.0f;
    }
  }
}

/// The sign bits of one transform.
struct HadamardSigns {
  const float* data;  // [3][..][padded]
  int64_t round_stride;

  __device__ uint32_t at(int round, int coordinate) const {
    return float_to_bits(data[round * round_stride + coordinate]) & 0x80000000u;
  }
  /// The product of the signs of one coordinate over the rounds up to this one.
  __device__ uint32_t product(int round, int coordinate) const {
    const uint32_t first = at(0, coordinate);
    return round == 0 ? first : round == 1 ? first ^ at(1, coordinate) : first ^ at(1, coordinate) ^ at(2, coordinate);
  }
};

__device__ inline HadamardSigns hadamard_signs(const LshHashArgs& args, const HashTile& tile, int part) {
  const float* signs = static_cast<const float*>(args.signs.data) + plane_head_of(args, tile) * args.signs.stride[0];
  return {signs + part * args.signs.stride[2], args.signs.stride[1]};
}

/// Factor `k` of a thread: first those of stride 1 by block, then of stride 2, ...; the last one meets the token's
/// other thread. There both compute mine + c other, so the sign of the second one turns round by round.
template <int kCount>
__device__ inline uint32_t factor_sign(const HadamardSigns& signs, int round, int part, int k) {
  const int left = kCount - k;
  if (left == 1) return signs.product(round, 0) ^ signs.product(round, kCount) ^ (uint32_t(round + part) << 31);
  const int blocks_log2 = 32 - __clz(left - 1), stride = kCount >> blocks_log2;
  const int low = part * kCount + (k - kCount + (1 << blocks_log2)) * 2 * stride;
  return signs.at(round, low) ^ signs.at(round, low + stride);
}

template <class Shape, int kCount>
__device__ inline void make_factors(const LshHashArgs& args, const HashTile& tile, const HadamardGroup& group) {
  constexpr int kSplit = Shape::kPadded / kCount;
  for (int i = int(threadIdx.x); i < group.count * 3 * Shape::kPadded; i += kHadamardThreads) {
    const int transform = i / (3 * Shape::kPadded), round = i / Shape::kPadded % 3;
    const int part = i % Shape::kPadded / kCount, k = i % kCount;
    const HadamardSigns signs = hadamard_signs(args, tile, group.first + transform);
    // With one thread a token the last factor is not used, and its coordinates do not exist.
    const uint32_t sign = kSplit == 1 && k == kCount - 1 ? 0 : factor_sign<kCount>(signs, round, part, k);
    group.factors[i] = bits_to_float(0x3f800000u | sign);
  }
  for (int i = int(threadIdx.x); i < group.count * kSplit; i += kHadamardThreads) {
    const int part = i % kSplit;
    const HadamardSigns signs = hadamard_signs(args, tile, group.first + i / kSplit);
    const uint32_t sign = signs.product(2, part * kCount) ^ (uint32_t(part) << 31);
    group.last[i / kSplit * 4 + part] = bits_to_float(0x3f800000u | sign);
  }
}

/// Butterflies of strides kStride, 2 kStride, ...; `factors` are those of the whole round, 16-byte aligned.
template <int kStride, int kCount>
__device__ inline void butterflies(float (&a)[kCount], const float* factors) {
  constexpr int kBlocks = kCount / (2 * kStride), kFirst = kCount - 2 * kBlocks;
#pragma unroll
  for (int block = 0; block < kBlocks; block += 4) {
    // The last four factors are those of the two longest strides and of the other thread.
    const float4 four = *reinterpret_cast<const float4*>(factors + (kFirst + block) / 4 * 4);
    const float r[4] = {kBlocks == 1 ? four.z : four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4 && block + k < kBlocks; ++k)
#pragma unroll
      for (int i = 0; i < kStride; ++i) {
        float &low = a[(block + k) * 2 * kStride + i], &high = a[(block + k) * 2 * kStride + kStride + i];
        const float first = low, second = high;
        low = fmaf(r[k], second, first);
        high = fmaf(-r[k], second, first);
      }
  }
  if constexpr (2 * kStride < kCount) butterflies<2 * kStride>(a, factors);
}

/// One round. The two threads of a token meet in the last stride.
template <int kSplit, int kCount>
__device__ inline void transform_round(float (&a)[kCount], const float* factors) {
  butterflies<1>(a, factors);
  if constexpr (kSplit == 2) {
    const float factor = factors[kCount - 1];
#pragma unroll
    for (int i = 0; i < kCount; ++i) a[i] = fmaf(factor, __shfl_xor_sync(kFullMask, a[i], kWarp / 2), a[i]);
  }
}

/// Rows whose largest |x| is outside [2^-100, 2^100] are scaled, here and in shared memory.
template <int kCount, int kSplit>
__device__ inline void rescue_row(float (&a)[kCount], float* row) {
  float squares[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) squares[i % 4] = fmaf(a[i], a[i], squares[i % 4]);
  float square = squares[0] + squares[1] + squares[2] + squares[3];
  if (kSplit == 2) square += __shfl_xor_sync(kFullMask, square, kWarp / 2);
  // Inside these bounds the largest is inside too, and the factor is 1.
  if (!__any_sync(kFullMask, !(square > 0x1p-100f && square < 0x1p100f))) return;
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(a[i]));
  if (kSplit == 2) largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, kWarp / 2));
  const float factor = rescue_factor(largest);
  if (factor == 1.0f) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) row[i] = a[i] *= factor;
}

/// One transform of the thread's token: the words of its coordinates.
template <int kCount, int kSplit, bool kRescue>
__device__ inline void transform_row(const HadamardGroup& group, int transform, int token, int part) {
  using Shape = HadamardShape<kCount, kSplit>;
  float* row = group.rows + token * Shape::kPitch + part * kCount;
  float a[kCount];
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + i);
    a[i] = four.x, a[i + 1] = four.y, a[i + 2] = four.z, a[i + 3] = four.w;
  }
  if (kRescue && group.first + transform == 0) rescue_row<kCount, kSplit>(a, row);
#pragma unroll 1
  for (int round = 0; round < 3; ++round)
    transform_round<kSplit>(a, group.factors + ((transform * 3 + round) * kSplit + part) * kCount);
  const float last = -group.last[transform * 4 + part];
#pragma unroll
  for (int w = 0; w < kCount / 32; ++w) {
    uint32_t word = 0;
    // Adding 0 turns -0 into 0, so the sign bit of -y is the bit y > 0.
#pragma unroll
    for (int i = 31; i >= 0; --i) word = __funnelshift_r(float_to_bits(fmaf(last, a[32 * w + i], 0.0f)), word, 31);
    // Infinities and NaN have spread to all coordinates as NaN, whose bits are 0.
    if (a[0] != a[0]) word = 0;
    group.words[(transform * Shape::kWords + part * (kCount / 32) + w) * Shape::kTokens + token] = word;
  }
}

}  // namespace subquad::cuda
