/// Register-tiled products of small matrices, and the packing that feeds them: what the dense attention kernels share.
///
///   C[r, c] (+)= sum_d A[r, d] * B[d, c]
///
/// B is packed in panels [depth, kPanel], so that the inner loop reads it front to back. A is read one element per row
/// and step and broadcast: from a transposed panel, or from the tile of weights that an earlier product left. Each
/// element of C is a fixed chain of fused multiply-adds in the order of d, so its bits do not depend on how the rows
/// are grouped.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/operand.h"
#include "core/visit.h"
#include "cpu/simd.h"

namespace subquad::cpu::SUBQUAD_ISA {

// 8 x 2 accumulators keep two fused multiply-add units busy over their latency; 16 registers hold no more than 4 x 2.
#if defined(__AVX512F__) || defined(__aarch64__)
static constexpr int kTileRows = 8;
#else
static constexpr int kTileRows = 4;
#endif
static constexpr int kPanelVectors = 2;
static constexpr int kPanel = kPanelVectors * kLanes;
// A tile of 64 columns: with head dimensions of 64 the packed keys and values of a tile (32 KiB) stay in the L1 cache.
static constexpr int kTileColumns = 64;
static_assert(kTileColumns % kPanel == 0 && kPanel % kTileRows == 0);

/// One register tile: kTileRows rows of C, `Vectors` vectors of columns of one panel.
template <bool Add, int Vectors, int RowStep, int DepthStep>
static inline void register_tile(const float* a, const float* panel, int64_t depth, float* c, int64_t pitch) {
  F32 sum[kTileRows][Vectors] = {};
  for (int64_t d = 0; d < depth; ++d, a += DepthStep, panel += kPanel) {
    F32 b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = load(panel + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const F32 element = set(a[r * RowStep]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(element, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * pitch + v * kLanes;
      store(to, Add ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

/// kTileRows rows of C over `columns` columns (rounded up to whole vectors): panels [panel_depth, kPanel] behind each
/// other, of which the first `depth` steps are summed.
template <bool Add, int RowStep, int DepthStep>
static inline void tile_product(const float* a, const float* panels, int64_t panel_depth, int64_t depth, float* c,
                                int64_t pitch, int64_t columns) {
  for (; columns > kLanes; columns -= kPanel, panels += panel_depth * kPanel, c += kPanel)
    register_tile<Add, kPanelVectors, RowStep, DepthStep>(a, panels, depth, c, pitch);
  if (columns > 0) register_tile<Add, 1, RowStep, DepthStep>(a, panels, depth, c, pitch);
}

// Long products are summed in pieces of so many steps, which keeps the rounding of one long chain down.
static constexpr int64_t kDepthPiece = 128;

/// C = A B with A transposed: row r at column r of a panel (`a` points at its first row).
static inline void product_of_panels(const float* a, const float* panels, int64_t depth, int64_t panel_depth, float* c,
                                     int64_t columns) {
  tile_product<false, 1, kPanel>(a, panels, panel_depth, smaller(depth, kDepthPiece), c, kTileColumns, columns);
  for (int64_t d = kDepthPiece; d < depth; d += kDepthPiece)
    tile_product<true, 1, kPanel>(a + d * kPanel, panels + d * kPanel, panel_depth, smaller(depth - d, kDepthPiece), c,
                                  kTileColumns, columns);
}

/// C += A B with A a tile of weights [kTileRows, kTileColumns] (`a` and `panels` point at its first step of depth).
static inline void add_weighted_rows(const float* a, const float* panels, int64_t depth, float* c, int64_t pitch,
                                     int64_t columns) {
  tile_product<true, kTileColumns, 1>(a, panels, kTileColumns, depth, c, pitch, columns);
}

/// c[0..columns) += sum_d weights[d] * (row d of the panels of a tile): the rows that only one row of weights sees.
static inline void add_weighted_row(const float* weights, const float* panels, int64_t depth, float* c,
                                    int64_t columns) {
  for (int64_t j = 0; depth > 0 && j < columns; j += kLanes) {
    const float* column = panels + j / kPanel * (kTileColumns * kPanel) + j % kPanel;
    F32 sum = {};
    for (int64_t d = 0; d < depth; ++d) sum = fma(set(weights[d]), load(column + d * kPanel), sum);
    store(c + j, load(c + j) + sum);
  }
}

/// Rows per task, a multiple of kPanel: as many as `most`, for they share the packing of the columns, but few enough
/// for every thread to find some tasks.
static inline int64_t rows_per_task(int num_threads, int64_t heads, int64_t rows, int64_t most) {
  int64_t count = larger(kPanel, smaller(most, round_up(rows, kPanel)));
  while (count > 64 && heads * ((rows + count - 1) / count) < 4 * num_threads) count = round_up(count / 2, kPanel);
  return count;
}

/// Row b of a mask [B, tokens], or null if there is no mask.
static inline const bool* mask_of(const Operand& mask, int64_t b) {
  return mask.data ? element<const bool>(mask, b) : nullptr;
}

/// How many of the tokens [begin, end) `keep` (or null) keeps.
static inline int64_t count_kept(const bool* keep, int64_t begin, int64_t end) {
  if (!keep) return end - begin;
  int64_t kept = 0;
  for (int64_t i = begin; i < end; ++i) kept += keep[i];
  return kept;
}

static inline bool any_kept(const bool* keep, int64_t first, int64_t count) {
  return !keep || memchr(keep + first, 1, size_t(count));
}

/// Row place(r) of one head of x, or zeros where that is negative, as row r of f32 [kPanel, pitch], zeros behind it.
template <class F>
static inline void gather_places(const Operand& x, int64_t batch, int64_t head, int64_t dim, float* rows, int64_t pitch,
                                 F&& place) {
  visit_float(x.dtype, [&](auto tag) {
    const auto* base = element<const decltype(tag)>(x, batch, head);
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t from = place(r), end = from < 0 ? 0 : dim;
      if (from >= 0) widen(base + from * x.stride[2], rows + r * pitch, dim);
      memset(rows + r * pitch + end, 0, size_t(pitch - end) * sizeof(float));
    }
  });
}

/// Rows [first, first + count) of one head of x as f32 [kPanel, pitch]; zero behind the end of a row, for rows past
/// `count`, and for rows that `keep` (one bool per row of the head, or null) leaves out, whatever they hold.
static inline void gather_rows(const Operand& x, int64_t batch, int64_t head, int64_t first, int64_t count,
                               const bool* keep, int64_t dim, float* rows, int64_t pitch) {
  gather_places(x, batch, head, dim, rows, pitch,
                [&](int64_t r) { return r < count && (!keep || keep[first + r]) ? first + r : int64_t(-1); });
}

/// Row `row` of one head of x = from[0..dim), rounded to the dtype of x.
static inline void store_row(const Operand& x, int64_t batch, int64_t head, int64_t row, const float* from,
                             int64_t dim) {
  visit_float(x.dtype, [&](auto tag) { narrow(from, element<decltype(tag)>(x, batch, head, row), dim); });
}

/// Asks for a row in advance; inlined by force, as prefetch is.
static __attribute__((always_inline)) inline void prefetch_row(const Operand& x, int64_t batch, int64_t head,
                                                               int64_t row, int64_t dim) {
  const int64_t size = dtype_bytes(x.dtype), at = batch * x.stride[0] + head * x.stride[1] + row * x.stride[2];
  prefetch(static_cast<const char*>(x.data) + at * size, dim * size);
}

/// The transpose of rows [kPanel, pitch] as a panel [pitch, kPanel]; pitch is a multiple of kLanes.
static inline void transpose_rows(const float* rows, int64_t pitch, float* panel) {
  for (int64_t r = 0; r < kPanel; r += kLanes) {
    for (int64_t d = 0; d < pitch; d += kLanes) {
      F32 x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(rows + (r + i) * pitch + d);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel + r, x[i]);
    }
  }
}

/// Rows [kPanel, pitch] cut into the panels [kTileColumns, kPanel] of a tile, as its rows `first` onwards.
static inline void split_rows(const float* rows, int64_t pitch, int64_t first, float* panels) {
  for (int64_t j = 0; j < pitch; j += kLanes) {
    float* to = panels + j / kPanel * (kTileColumns * kPanel) + first * kPanel + j % kPanel;
    for (int64_t r = 0; r < kPanel; ++r) store(to + r * kPanel, load(rows + r * pitch + j));
  }
}

/// The first elements of a row, zeros behind them.
template <class T>
static inline F32 load_part(const T* from, int64_t count) {
  float lane[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = to_float(from[i]);
  return load(lane);
}

/// Calls f(row of x as T*, its index) for the rows [first, first + count) of one head; a row of zeros stands for those
/// past `present` and for those that `keep` (one bool per row from `first` on, or null) leaves out.
template <class T, class F>
static inline void for_each_row(const Operand& x, int64_t batch, int64_t head, int64_t first, int64_t present,
                                int64_t count, const bool* keep, F&& f) {
  static constexpr T kZeros[kMaxHeadDim] = {};
  const T* base = element<const T>(x, batch, head);
  for (int64_t r = 0; r < count; ++r)
    f(r < present && (!keep || keep[r]) ? base + (first + r) * x.stride[2] : kZeros, r);
}

/// Rows [first, first + count) of one head of x as transposed panels [depth, kPanel], depth = dim in whole vectors.
/// Rows that `keep` (one bool per row from `first` on, or null) leaves out are zero, and those that fill up a panel.
static inline void pack_transposed(const Operand& x, int64_t batch, int64_t head, int64_t first, int64_t count,
                                   const bool* keep, int64_t dim, float* panels) {
  const int64_t depth = round_up(dim, kLanes);
  visit_float(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* rows[kLanes];
    for_each_row<T>(x, batch, head, first, count, round_up(count, kPanel), keep, [&](const T* row, int64_t r) {
      rows[r % kLanes] = row;
      if ((r + 1) % kLanes != 0) return;
      float* panel = panels + r / kPanel * (depth * kPanel) + r % kPanel / kLanes * kLanes;
      for (int64_t d = 0; d < depth; d += kLanes) {
        F32 v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = d + kLanes <= dim ? load(rows[i] + d) : load_part(rows[i] + d, dim - d);
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, v[i]);
      }
    });
  });
}

/// Rows [first, first + count) of one head of x cut into the panels [kTileColumns, kPanel] of a tile, those that `keep`
/// leaves out as zeros. True if every element is finite.
static inline bool pack_split(const Operand& x, int64_t batch, int64_t head, int64_t first, int64_t count,
                              const bool* keep, int64_t dim, float* panels) {
  F32 sum = {};  // of x - x, which is NaN where x is not finite
  visit_float(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_each_row<T>(x, batch, head, first, count, count, keep, [&](const T* row, int64_t r) {
      for (int64_t j = 0; j < dim; j += kLanes) {
        const F32 v = j + kLanes <= dim ? load(row + j) : load_part(row + j, dim - j);
        store(panels + j / kPanel * (kTileColumns * kPanel) + r * kPanel + j % kPanel, v);
        sum += v - v;
      }
    });
  });
  return reduce_add(sum) == 0.0f;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
