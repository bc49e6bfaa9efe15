/// What both forms of hashing share: tiles of tokens, and where their codes go.
#pragma once
#include "code_stream.cuh"
#include "device/arithmetic.cuh"
#include "device/load_store.cuh"
#include "ops/lsh_hash_args.h"

namespace subquad::cuda {

/// Tokens first ... first + count - 1 of head (b, h).
struct HashTile {
  int64_t b, h, first;
  int count;
};

/// The tile of this block; `before` tiles belong to earlier launches.
__device__ inline HashTile hash_tile(const LshHashArgs& args, int64_t before, int tokens) {
  const Quotient tile = divide(before + blockIdx.x, ceil_div(args.seq, tokens)), head = divide(tile.whole, args.heads);
  const int64_t first = tile.rest * tokens, left = args.seq - first;
  return {head.whole, head.rest, first, int(left < tokens ? left : tokens)};
}

__device__ inline int64_t plane_head_of(const LshHashArgs& args, const HashTile& tile) {
  return tile.h / (args.heads / args.plane_heads);
}

/// The first row of x of a tile.
template <class T>
__device__ inline const T* rows_of(const LshHashArgs& args, const HashTile& tile) {
  return static_cast<const T*>(args.x.data) + tile.b * args.x.stride[0] + tile.h * args.x.stride[1] +
         tile.first * args.x.stride[2];
}

__device__ inline CodeColumn codes_of(const LshHashArgs& args, const HashTile& tile, int token) {
  const int64_t at = tile.b * args.codes.stride[0] + tile.h * args.codes.stride[1] + tile.first + token;
  const bool wide = args.codes.dtype == DType::i32;
  return {static_cast<char*>(args.codes.data) + at * (wide ? 4 : 2), args.codes.stride[2], wide};
}

/// What the CPU multiplies a row by whose largest |x| is given, so that sums neither overflow nor lose bits.
__device__ inline float rescue_factor(float largest) {
  return largest > 0x1p100f ? 0x1p-64f : largest < 0x1p-100f ? 0x1p64f : 1.0f;
}

}  // namespace subquad::cuda
