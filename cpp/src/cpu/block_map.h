/// The map between the compressed columns of a row and its visible keys, in exact integers (sparse_pattern.h).
#pragma once
#include "cpu/simd.h"
#include "ops/sparse_pattern_args.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// Ranks [begin, end) of one row.
struct RankRange {
  int64_t begin, end;
};

/// First rank of column `column` of a row with `visible` keys: column * visible / columns, rounded half up.
static inline int64_t column_start(int64_t column, int64_t visible, int64_t columns) {
  return (2 * column * visible + columns) / (2 * columns);
}

/// The column that rank `rank` < visible belongs to.
static inline int64_t column_of(int64_t rank, int64_t visible, int64_t columns) {
  return ((2 * rank + 1) * columns - 1) / (2 * visible);
}

/// The ranks that a selected column keeps.
static inline RankRange kept_ranks(int64_t column, int64_t visible, int64_t columns, int64_t cap) {
  const int64_t begin = column_start(column, visible, columns), end = column_start(column + 1, visible, columns);
  return {end - begin > cap ? end - cap : begin, end};
}

/// The 64 bits of columns [64 word, 64 word + 64) of a row of `columns` columns; 0 for those that there are not.
static inline uint64_t column_bits(const uint8_t* bits, int64_t word, int64_t columns) {
  const int64_t left = columns - 64 * word, bytes = left >= 64 ? 8 : (left + 7) / 8;
  uint64_t value = 0;
  memcpy(&value, bits + 8 * word, size_t(bytes));
  return left >= 64 ? value : value & ((uint64_t(1) << left) - 1);
}

}  // namespace subquad::cpu::SUBQUAD_ISA
