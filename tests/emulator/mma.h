/// Tensor-core instructions. The last lane of the warp to arrive does the work of all.
#pragma once
#include "emulator/cuda.h"
#include "subquad/dtype.h"

namespace emulator {

template <class T>
uint32_t pack_as(float low, float high) {
  T a, b;
  subquad::from_float(low, &a), subquad::from_float(high, &b);
  return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}

template <class T>
float half_of_word(uint32_t word, unsigned high) {
  T x;
  x.bits = uint16_t(word >> 16 * high);
  return subquad::to_float(x);
}

/// d += a b with a [16, 16], b [16, 8], d [16, 8]; a lane's words are a[0:4], b[0:2], d[0:4].
template <class T>
void multiply_fragments(WarpMeeting::Words& words, unsigned) {
  float a[16][16], b[16][8], d[16][8];
  const auto word = [&](unsigned lane, unsigned i) { return uint32_t(words[lane][i / 2] >> 32 * (i % 2)); };
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i)
      for (unsigned c = 0; c < 2; ++c) a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1) + c] = half_of_word<T>(word(lane, i), c);
    for (unsigned i = 0; i < 2; ++i)
      for (unsigned c = 0; c < 2; ++c) b[2 * t + 8 * i + c][g] = half_of_word<T>(word(lane, 4 + i), c);
    for (unsigned i = 0; i < 4; ++i) d[g + 8 * (i >> 1)][2 * t + (i & 1)] = same_bits<float>(word(lane, 6 + i));
  }
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned k = 0; k < 16; ++k)
      for (unsigned column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (unsigned lane = 0; lane < kLanes; ++lane)
    std::memcpy(words[lane], &d[lane / 4][lane % 4 * 2], 8),
        std::memcpy(words[lane] + 1, &d[lane / 4 + 8][lane % 4 * 2], 8);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint64_t words[5];
  std::memcpy(words, a, 16), std::memcpy(words + 2, b, 8), std::memcpy(words + 3, d, 16);
  if (lanes_of(~0u) != ~0u) die("mma by a warp of fewer than 32 lanes");
  const auto& results = wait_for_warp(~0u, words, 5, {"mma", __FILE__, __LINE__}, multiply_fragments<T>);
  std::memcpy(d, results[running->self->lane], 16);
}

/// Lane 8 j + r names row r of matrix j; its words become the four that it gets.
template <bool Transposed>
void load_matrices(WarpMeeting::Words& words, unsigned) {
  uint16_t matrix[4][8][8];
  for (unsigned lane = 0; lane < kLanes; ++lane)
    std::memcpy(matrix[lane / 8][lane % 8], reinterpret_cast<const void*>(uintptr_t(words[lane][0])), 16);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    uint32_t r[4];
    for (unsigned j = 0; j < 4; ++j) {
      const uint16_t low = Transposed ? matrix[j][2 * t][g] : matrix[j][g][2 * t];
      const uint16_t high = Transposed ? matrix[j][2 * t + 1][g] : matrix[j][g][2 * t + 1];
      r[j] = low | uint32_t(high) << 16;
    }
    std::memcpy(words[lane], r, 16);
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) & 15) die("ldmatrix: a row is not aligned to 16 bytes");
  if (lanes_of(~0u) != ~0u) die("ldmatrix by a warp of fewer than 32 lanes");
  const uint64_t word = reinterpret_cast<uintptr_t>(row);
  const auto& results = wait_for_warp(~0u, &word, 1, {"ldmatrix", __FILE__, __LINE__},
                                      transposed ? load_matrices<true> : load_matrices<false>);
  std::memcpy(r, results[running->self->lane], 16);
}

}  // namespace emulator
