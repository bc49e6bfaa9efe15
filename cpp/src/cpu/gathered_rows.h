/// Rows of a head that stand anywhere in memory, of any dimension, as vectors.
#pragma once
#include "cpu/tile.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// The rows of one head.
template <class T>
struct HeadRows {
  const T* base;
  int64_t stride, dim;
  const T* at(int64_t row) const { return base + row * stride; }
};

template <class T>
static inline HeadRows<T> rows_of_head(const Operand& x, int64_t batch, int64_t head, int64_t dim) {
  return {element<const T>(x, batch, head), x.stride[2], dim};
}

/// The elements behind the last whole vector of a row: the top lanes of the vector that ends with the row, or the low
/// lanes where a row is shorter than a vector.
struct RowTail {
  int64_t rest, begin;
  I32 mask;
};

static inline RowTail row_tail(int64_t dim) {
  const int64_t rest = dim % kLanes;
  if (dim < kLanes) return {rest, 0, lanes_below(rest)};
  return {rest, dim - kLanes, lane_index() >= int32_t(kLanes - rest)};
}

/// The tail of a row, zeros in the other lanes.
template <class T>
static inline F32 load_tail(const T* row, int64_t dim, const RowTail& tail) {
  return dim < kLanes ? load_part(row, dim) : select(tail.mask, load(row + tail.begin), F32{});
}

}  // namespace subquad::cpu::SUBQUAD_ISA
