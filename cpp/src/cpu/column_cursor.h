/// The blocks of a row in the order of its ranks.
#pragma once
#include "cpu/block_map.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// A column and the first rank behind it; steps from column to column without a division.
struct ColumnCursor {
  int64_t column, end;
  int64_t rest, modulus;          // column_start(column + 1) = end + rest / modulus
  int64_t whole_step, step_rest;  // of a column
};

static inline ColumnCursor first_column(int64_t visible, int64_t columns) {
  const int64_t modulus = 2 * columns, top = 2 * visible + columns;
  return {0, top / modulus, top % modulus, modulus, visible / columns, visible % columns * 2};
}

/// To the column of `rank`, which is that of the cursor or a later one.
static inline void seek(ColumnCursor& at, int64_t rank) {
  while (at.end <= rank) {
    ++at.column, at.end += at.whole_step, at.rest += at.step_rest;
    const bool carries = at.rest >= at.modulus;
    at.end += carries, at.rest -= carries ? at.modulus : 0;
  }
}

}  // namespace subquad::cpu::SUBQUAD_ISA
