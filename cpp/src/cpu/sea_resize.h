/// From the columns of the decoder of sea_estimate to probabilities: resizing, LayerNorm and softmax of single rows.
#pragma once
#include "cpu/exp.h"
#include "cpu/sea_layout.h"
#include "cpu/tile.h"

namespace subquad::cpu::SUBQUAD_ISA::sea {

/// Floats that a row of n columns takes in scratch memory.
static inline int64_t whole_vectors(int64_t n) { return round_up(n, kLanes); }

/// Lane i of the result is lane i / Repeat of x, or of `other` where i % Repeat == Lane.
template <int Repeat, int Lane, int... L>
static inline F32 repeat_lanes(F32 x, F32 other, Lanes<L...>) {
  return __builtin_shufflevector(x, other, (L / Repeat + (L % Repeat == Lane ? kLanes : 0))...);
}

/// x[0..4 width) = the columns of y [width] four times each, with a column of zeros on either side, averaged over areas
/// back to 4 width columns; zeros to the end of the last vector. The elements around y are read; y[-1] and y[width] are
/// zero. Returns the sum of x.
///
/// Every area covers two columns: j and j + 1 of the padded ones in the first half, j + 1 and j + 2 in the second. So
/// all are columns of y, but for the first of each four in the first half and the last of each four in the second.
static inline float average_areas(const float* y, int64_t width, float* x) {
  const int64_t n = 4 * width;
  F32 sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const float* from = y + j / 4;
    const F32 here = load(from), half = set(0.5f);
    const F32 left = repeat_lanes<4, 0>(here, half * (load(from - 1) + here), AllLanes{});
    const F32 right = repeat_lanes<4, 3>(here, half * (here + load(from + 1)), AllLanes{});
    const F32 area = select(lanes_below(n - j), select(lanes_below(n / 2 - j), left, right), F32{});
    store(x + j, area);
    sum += area;
  }
  return reduce_add(sum);
}

/// x[0..2 width) = y [width] by linear interpolation at half-pixel centres. The elements around y are read; y[-1]
/// equals y[0], y[width] equals y[width - 1].
static inline void double_columns(const float* y, int64_t width, float* x) {
  for (int64_t j = 0; j < 2 * width; j += kLanes) {
    const float* from = y + j / 2;
    const F32 most = set(0.75f) * load(from);
    const F32 left = fma(set(0.25f), load(from - 1), most), right = fma(set(0.25f), load(from + 1), most);
    store(x + j, repeat_lanes<2, 1>(left, right, AllLanes{}));
  }
}

/// A few rows of n columns, `pitch` = whole_vectors(n) apart. Every step is taken for all rows before the next, since
/// the steps of a single row wait for each other.
struct Columns {
  float* x;
  int64_t n, pitch;
  int rows;
};

static constexpr int kMostRows = 4;

/// Each row = LayerNorm(row), given its sum and zeros to the end of the last vector.
static inline void normalize_columns(const Columns& c, const float* sum, const float* weight, const float* bias) {
  float scale[kMostRows];
  for (int r = 0; r < c.rows; ++r) {
    float* x = c.x + r * c.pitch;
    const F32 mean = set(sum[r] / float(c.n));
    F32 squares = {};
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const F32 centred = select(lanes_below(c.n - j), load(x + j) - mean, F32{});
      squares = fma(centred, centred, squares);
      store(x + j, centred);
    }
    scale[r] = 1.0f / sqrt(reduce_add(squares) / float(c.n) + kNormEpsilon);
  }
  for (int64_t j = 0; j < c.n; j += kLanes) {
    const bool whole = j + kLanes <= c.n;
    const F32 factor = whole ? load(weight + j) : load_part(weight + j, c.n - j);
    const F32 offset = whole ? load(bias + j) : load_part(bias + j, c.n - j);
    for (int r = 0; r < c.rows; ++r) {
      float* x = c.x + r * c.pitch + j;
      store(x, fma(load(x) * set(scale[r]), factor, offset));
    }
  }
}

/// Row r of `out`, at out + r step, = softmax(row r). Overwrites the rows to the end of the last vector.
static inline void softmax_columns(const Columns& c, float* out, int64_t step) {
  float largest[kMostRows], factor[kMostRows];
  for (int r = 0; r < c.rows; ++r) {
    float* x = c.x + r * c.pitch;
    F32 most = set(-kInfinity);
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const F32 score = select(lanes_below(c.n - j), load(x + j), set(-kInfinity));
      most = max(most, score);
      store(x + j, score);
    }
    largest[r] = reduce_max(most);
  }
  for (int r = 0; r < c.rows; ++r) {
    float* x = c.x + r * c.pitch;
    F32 sum = {};
    for (int64_t j = 0; j < c.n; j += kLanes) {
      const F32 power = exp(load(x + j) - set(largest[r]));
      sum += power;
      store(x + j, power);
    }
    factor[r] = 1.0f / reduce_add(sum);
  }
  for (int r = 0; r < c.rows; ++r, out += step) {
    const float* x = c.x + r * c.pitch;
    int64_t j = 0;
    for (; j + kLanes <= c.n; j += kLanes) store(out + j, load(x + j) * set(factor[r]));
    if (j < c.n) store_part(out + j, load(x + j) * set(factor[r]), c.n - j);
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA::sea
