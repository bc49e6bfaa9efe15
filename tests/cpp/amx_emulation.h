/// The tile instructions in software, in place of the intrinsics of the same names: include it, then the source of an
/// AMX kernel, to run the kernel on a CPU without tile registers.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "subquad/dtype.h"

namespace amx_emulation {

struct Tiles {
  uint8_t bytes[8][16][64];
  bool configured;
};

static inline Tiles& tiles() {
  thread_local Tiles own = {};
  return own;
}

/// The registers of a thread exist between its loadconfig and its release only.
static inline uint8_t (&tile(int index))[16][64] {
  if (!tiles().configured) std::abort();
  return tiles().bytes[index];
}

static inline void load_config(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, 64);
  bool full = bytes[0] == 1;
  for (int i = 0; i < 8; ++i) full &= bytes[16 + 2 * i] == 64 && bytes[48 + i] == 16;
  if (!full || tiles().configured) std::abort();
  std::memset(tiles().bytes, 0, sizeof tiles().bytes);
  tiles().configured = true;
}

static inline void release() {
  if (!tiles().configured) std::abort();
  tiles().configured = false;
}

static inline void zero(int index) { std::memset(tile(index), 0, sizeof tile(index)); }

static inline void load(int index, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile(index)[r], static_cast<const char*>(base) + r * stride, 64);
}

static inline void store(int index, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(base) + r * stride, tile(index)[r], 64);
}

/// Subnormal numbers count as zero, as inputs and as results.
static inline float flushed(float x) { return x < 0x1p-126f && x > -0x1p-126f ? 0.0f : x; }

static inline float element(const uint8_t (&row)[64], int index) {
  subquad::bfloat16 x;
  std::memcpy(&x, row + 2 * index, 2);
  return flushed(subquad::to_float(x));
}

/// c[m][n] += sum_k a[m][2 k] b[k][2 n] + sum_k a[m][2 k + 1] b[k][2 n + 1]
static inline void multiply(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < 16; ++k) {
        even = flushed(even + element(tile(a)[m], 2 * k) * element(tile(b)[k], 2 * n));
        odd = flushed(odd + element(tile(a)[m], 2 * k + 1) * element(tile(b)[k], 2 * n + 1));
      }
      std::memcpy(&sum, tile(c)[m] + 4 * n, 4);
      sum = flushed(sum + flushed(even + odd));
      std::memcpy(tile(c)[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulation::load_config(config)
#define _tile_release() amx_emulation::release()
#define _tile_zero(index) amx_emulation::zero(index)
#define _tile_loadd(index, base, stride) amx_emulation::load(index, base, stride)
#define _tile_stored(index, base, stride) amx_emulation::store(index, base, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::multiply(c, a, b)
