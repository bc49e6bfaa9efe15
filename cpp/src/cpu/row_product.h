/// Products of rows that are not packed: what the backward passes of dense attention share. The left factor is read one
/// element at a time, the right one as panels or as rows.
#pragma once
#include "cpu/tile.h"
#include "cpu/visible.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// Factors with the element of row r and step d at at[r * row + d * step].
struct Factors {
  const float* at;
  int64_t row, step;
};

/// kTileRows rows of C over `Vectors` vectors of columns; the rows of B are `next` floats apart.
template <bool Add, int Vectors>
static inline void register_product(Factors a, const float* b, int64_t next, int64_t depth, float* c, int64_t pitch) {
  F32 sum[kTileRows][Vectors] = {};
  for (int64_t d = 0; d < depth; ++d, a.at += a.step, b += next) {
    F32 row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const F32 element = set(a.at[r * a.row]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(element, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * pitch + v * kLanes;
      store(to, Add ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

/// C (+)= A B over `columns` columns, rounded up to whole vectors; panels of kPanel columns of B are `panel` floats
/// apart.
template <bool Add>
static inline void product(Factors a, const float* b, int64_t next, int64_t panel, int64_t depth, float* c,
                           int64_t pitch, int64_t columns) {
  for (; columns > kLanes; columns -= kPanel, b += panel, c += kPanel)
    register_product<Add, kPanelVectors>(a, b, next, depth, c, pitch);
  if (columns > 0) register_product<Add, 1>(a, b, next, depth, c, pitch);
}

/// C = A B with A rows of `pitch` floats and B panels [pitch, kPanel].
static inline void product_of_rows(const float* a, const float* panels, int64_t depth, int64_t pitch, float* c,
                                   int64_t columns) {
  product<false>({a, pitch, 1}, panels, kPanel, pitch * kPanel, smaller(depth, kDepthPiece), c, kTileColumns, columns);
  for (int64_t d = kDepthPiece; d < depth; d += kDepthPiece)
    product<true>({a + d, pitch, 1}, panels + d * kPanel, kPanel, pitch * kPanel, smaller(depth - d, kDepthPiece), c,
                  kTileColumns, columns);
}

static inline void clear(float* x, int64_t count) { memset(x, 0, size_t(count) * sizeof(float)); }

/// Whether all elements of rows are finite.
static inline bool is_finite(const float* rows, int64_t size) {
  F32 sum = {};  // of x - x, which is NaN where x is not finite
  for (int64_t i = 0; i < size; i += kLanes) sum += load(rows + i) - load(rows + i);
  return reduce_add(sum) == 0.0f;
}

/// sums[r] += the weights of r times the rows of a tile. A weight of 0 adds nothing, which a product does only where
/// all rows are finite; the bits are the same.
static inline void add_weighted(Factors weights, const float* rows, int64_t pitch, Interval depth, bool all_finite,
                                float* sums) {
  if (depth.lo >= depth.hi) return;
  weights.at += depth.lo * weights.step, rows += depth.lo * pitch;
  const int64_t count = depth.hi - depth.lo;
  if (all_finite) return product<true>(weights, rows, pitch, kPanel, count, sums, pitch, pitch);
  for (int r = 0; r < kTileRows; ++r, weights.at += weights.row, sums += pitch) {
    for (int64_t j = 0; j < pitch; j += kLanes) {
      F32 sum = {};
      for (int64_t d = 0; d < count; ++d)
        if (const float weight = weights.at[d * weights.step]; weight != 0)
          sum = fma(set(weight), load(rows + d * pitch + j), sum);
      store(sums + j, load(sums + j) + sum);
    }
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
