/// Codes from the sign words of Hadamard transforms. A lane is a token and its words are its own, so nothing waits; the
/// two threads of a token of 256 coordinates share the codes.
#pragma once
#include "code_stream.cuh"
#include "lsh_hash_hadamard.cuh"

namespace subquad::cuda {

/// The codes of one token, and the words of the group of transforms that is in shared memory.
struct Carver {
  const LshHashArgs& args;
  const HadamardGroup& group;
  const uint32_t* words;  // [count][words_a_part][pitch]
  int pitch, words_a_part;
  CodeColumn column;

  __device__ CodeStream stream(int32_t first, int32_t end) const {
    return CodeStream(column, args.hash_bits, first, end);
  }

  /// Every step-th transform of the group from `part` on: its coordinates in order, the last ones unused.
  __device__ void carve_published(int part, int step) const {
    const int64_t codes_a_part = args.padded / args.hash_bits;
    for (int i = part; i < group.count; i += step) {
      const int64_t first = (group.first + i) * codes_a_part, end = first + codes_a_part;
      CodeStream codes = stream(int32_t(first), int32_t(end < args.num_hashes ? end : args.num_hashes));
      for (int w = 0; w < words_a_part; ++w) codes.push(words[(i * words_a_part + w) * pitch]);
    }
  }

  /// All transforms are in the group: codes first ... end - 1.
  __device__ void carve_strided(const BitSpread& spread, int32_t first, int32_t end) const {
    const int bit = first * args.hash_bits;
    CodeStream codes = stream(first, end);
    BitWeave weave(spread, words, pitch, words_a_part, args.parts, bit / 32);
    for (int skip = bit % 32; codes.next < end; skip = 0) codes.push(weave.next(), skip);
  }

  /// Some of the transforms are in the group: a coordinate's bits go to a few codes, which earlier groups have begun.
  __device__ void add_strided() const {
    if (group.first == 0)
      for (int32_t r = 0; r < args.num_hashes; ++r) column.store(r, 0);
    const uint32_t bits = uint32_t(args.hash_bits);
    for (int c = 0; c < args.padded; ++c) {
      uint32_t run = 0;
      for (int i = 0; i < group.count; ++i) run |= (words[(i * words_a_part + c / 32) * pitch] >> (c % 32) & 1u) << i;
      const uint32_t flat = uint32_t(c) * uint32_t(args.parts) + uint32_t(group.first);
      uint32_t r = flat / bits, j = flat - r * bits;
      for (int left = group.count; left > 0 && r < uint32_t(args.num_hashes); ++r, j = 0) {
        const int taken = int(bits - j);
        column.store(r, column.load(r) | (run & ((1u << taken) - 1)) << j);
        run >>= taken, left -= taken;
      }
    }
  }
};

template <class Shape>
__device__ inline void carve(const LshHashArgs& args, const BitSpread& spread, const HashTile& tile,
                             const HadamardGroup& group, int token, int part) {
  constexpr int kSplit = kHadamardThreads / Shape::kTokens;
  if (token >= tile.count) return;
  const Carver carver = {args, group, group.words + token, Shape::kTokens, Shape::kWords, codes_of(args, tile, token)};
  if (!args.strided)
    carver.carve_published(part, kSplit);
  else if (args.parts == group.capacity)
    carver.carve_strided(spread, int32_t(int64_t(args.num_hashes) * part / kSplit),
                         int32_t(int64_t(args.num_hashes) * (part + 1) / kSplit));
  else if (part == 0)
    carver.add_strided();
}

/// False where every number is inside the bounds, or zero.
template <class T>
constexpr bool kMayNeedRescue = true;
template <>
constexpr bool kMayNeedRescue<half> = false;

template <int kCount, int kSplit, class T>
__global__ void __launch_bounds__(kHadamardThreads, kCount == 64 ? 4 : 2)
    hadamard_kernel(const __grid_constant__ LshHashArgs args, const __grid_constant__ BitSpread spread, int capacity,
                    int64_t tiles_before) {
  using Shape = HadamardShape<kCount, kSplit>;
  constexpr int kTokensAWarp = kWarp / kSplit;
  const int token = warp_id() * kTokensAWarp + lane_id() % kTokensAWarp, part = lane_id() / kTokensAWarp;
  const HashTile tile = hash_tile(args, tiles_before, Shape::kTokens);
  HadamardGroup group = Shape::lay_out(dynamic_shared<float>(), capacity);
  stage_rows<Shape, T>(args, tile, group.rows);
  for (group.first = 0; group.first < args.parts; group.first += capacity) {
    const int left = args.parts - group.first;
    group.count = left < capacity ? left : capacity;
    make_factors<Shape, kCount>(args, tile, group);
    __syncthreads();
    for (int i = 0; i < group.count; ++i) transform_row<kCount, kSplit, kMayNeedRescue<T>>(group, i, token, part);
    if (kSplit > 1) __syncwarp();
    carve<Shape>(args, spread, tile, group, token, part);
    // The next group's factors and words take the places of these.
    __syncthreads();
  }
}

}  // namespace subquad::cuda
