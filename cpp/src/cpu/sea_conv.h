/// Convolutions over time and columns as register-tiled products, without a copy of the shifted input.
///
///   out[o, r, x] = bias[o] + sum_{c, j} weight[o, c, j] in[c, r, x; shifted by tap j]
///
/// A channel is a plane of rows with a gap of zeros before and behind each, so that every tap is one distance between
/// addresses, at the edges too. Each element is one chain of fused multiply-adds in the order of (c, j): its bits do
/// not depend on how rows are cut into tiles.
#pragma once
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace subquad::cpu::SUBQUAD_ISA::sea {

/// Planes of rows of `width` floats: `gap` zeros, then each row with a gap behind it, then room to end a vector.
struct Planes {
  int64_t width, gap, pitch;
  int64_t size;  // floats of a plane
};

static inline Planes planes_of(int64_t width, int64_t gap, int64_t rows) {
  // An odd number of cache lines, so that the planes of a point do not compete for one set of the cache.
  const int64_t lines = (gap + rows * (width + gap) + gap + kLanes + 15) / 16;
  return {width, gap, width + gap, (lines | 1) * 16};
}

static inline int64_t row_offset(const Planes& p, int64_t row) { return p.gap + row * p.pitch; }

/// Zeros the gaps before, between and behind the rows [first, end) of a plane.
static inline void clear_gaps(const Planes& p, int64_t first, int64_t end, float* plane) {
  for (int64_t i = 1; i <= p.gap; ++i)
    for (int64_t r = first; r <= end; ++r) plane[row_offset(p, r) - i] = 0;
}

/// Zeros the rows [first, end) of a plane and the gaps around them.
static inline void clear_rows(const Planes& p, int64_t first, int64_t end, float* plane) {
  if (first >= end) return;
  memset(plane + row_offset(p, first) - p.gap, 0, size_t((end - first) * p.pitch + p.gap) * sizeof(float));
}

struct Conv {
  const float* weight;  // [outputs, inputs, taps], rows `stride` apart
  int64_t stride;
  const float* bias;  // [outputs]; null: none
  int64_t inputs, outputs, taps;
  int64_t shift[9];  // of each tap, in floats
  bool relu;
};

/// Up to kTileRows outputs at `Vectors` places of the planes, given as offsets.
template <int Vectors>
static inline void conv_tile(const Conv& conv, int64_t plane, const float* in, const int64_t* places,
                             int64_t first_output, float* out) {
  const int64_t count = smaller(kTileRows, conv.outputs - first_output);
  const float *weight[kTileRows], *from[Vectors];
  F32 sum[kTileRows][Vectors];
  for (int v = 0; v < Vectors; ++v) from[v] = in + places[v];
  for (int r = 0; r < kTileRows; ++r) {
    // Rows past the last output repeat it; they are not stored.
    const int64_t output = first_output + smaller(r, count - 1);
    weight[r] = conv.weight + output * conv.stride;
    for (int v = 0; v < Vectors; ++v) sum[r][v] = set(conv.bias ? conv.bias[output] : 0.0f);
  }
  int64_t d = 0;
  for (int64_t c = 0; c < conv.inputs; ++c) {
    for (int64_t j = 0; j < conv.taps; ++j, ++d) {
      F32 x[Vectors];
      for (int v = 0; v < Vectors; ++v) x[v] = load(from[v] + conv.shift[j]);
      for (int r = 0; r < kTileRows; ++r) {
        const F32 element = set(weight[r][d]);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(element, x[v], sum[r][v]);
      }
    }
    for (int v = 0; v < Vectors; ++v) from[v] += plane;
  }
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= count) break;
    float* to = out + (first_output + r) * plane;
    // max keeps the NaN of its second argument.
    for (int v = 0; v < Vectors; ++v) store(to + places[v], conv.relu ? max(F32{}, sum[r][v]) : sum[r][v]);
  }
}

/// Rows [first, end) of all output planes, and zeros in the gaps around them.
static inline void convolve(const Conv& conv, const Planes& p, const float* in, int64_t first, int64_t end,
                            float* out) {
  if (first >= end) return;
  // Vectors that fill rows leave out the gaps; others run over rows and gaps alike.
  const int64_t per_row = p.width % kLanes == 0 ? p.width / kLanes : 0;
  const int64_t vectors = per_row ? (end - first) * per_row : ((end - first) * p.pitch + kLanes - 1) / kLanes;
  const int64_t start = row_offset(p, first);
  for (int64_t i = 0; i < vectors; i += kPanelVectors) {
    int64_t places[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t at = i + v;
      places[v] = start + (per_row ? at / per_row * p.pitch + at % per_row * kLanes : at * kLanes);
    }
    for (int64_t o = 0; o < conv.outputs; o += kTileRows) {
      if (i + kPanelVectors <= vectors)
        conv_tile<kPanelVectors>(conv, p.size, in, places, o, out);
      else
        conv_tile<1>(conv, p.size, in, places, o, out);
    }
  }
  for (int64_t o = 0; o < conv.outputs; ++o) clear_gaps(p, first, end, out + o * p.size);
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sea
