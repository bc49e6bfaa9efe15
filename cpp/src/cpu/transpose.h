/// The entries of sparse matrices sorted by column: a counting sort, stable and the same for any number of threads.
#pragma once
#include "core/operand.h"
#include "core/parallel.h"
#include "cpu/simd.h"

namespace subquad::cpu::SUBQUAD_ISA {

/// `matrices` matrices [rows, columns], each cut into `pieces` runs of rows that threads count and sort apart.
struct Transposition {
  int64_t matrices, rows, columns, pieces;
};

/// One count per column and piece: more than a few pieces would cost more memory than they gain time.
static constexpr int64_t kMostPieces = 8;

static inline Transposition plan_transposition(const Queue& queue, int64_t matrices, int64_t rows, int64_t columns) {
  const int64_t wanted = matrices > 0 ? (queue.num_threads + matrices - 1) / matrices : 1;
  return {matrices, rows, columns, larger(1, smaller(wanted, smaller(rows, kMostPieces)))};
}

/// Counters of all pieces but the last, whose counters are the result.
static inline int64_t early_counters(const Transposition& t) { return t.matrices * (t.pieces - 1) * t.columns; }

/// Numbers the entries by column, row and order inside the row. `ends` [matrices, columns] receives one past the
/// number of the last entry of each column; the numbers of a matrix count from first(matrix).
/// walk(matrix, begin, end, f) calls f(column, row, entry) for the entries of rows [begin, end) in order, and
/// put(matrix, number, row, entry) takes the number of each.
template <class Count, class First, class Walk, class Put>
static void transpose_entries(const Queue& queue, const Transposition& t, Count* early, Count* ends, First&& first,
                              Walk&& walk, Put&& put) {
  if (t.columns == 0) return;  // and so no entries
  const auto counters = [&](int64_t matrix, int64_t piece) {
    return piece == t.pieces - 1 ? ends + matrix * t.columns : early + (matrix * (t.pieces - 1) + piece) * t.columns;
  };
  const auto walk_piece = [&](int64_t matrix, int64_t piece, auto&& f) {
    walk(matrix, t.rows * piece / t.pieces, t.rows * (piece + 1) / t.pieces, f);
  };
  const auto count = [&](int64_t matrix, int64_t piece) {
    Count* counts = counters(matrix, piece);
    memset(counts, 0, size_t(t.columns) * sizeof(Count));
    walk_piece(matrix, piece, [=](int64_t column, int64_t, int64_t) { ++counts[column]; });
  };
  const auto accumulate = [&](int64_t matrix) {
    Count number = Count(first(matrix));
    for (int64_t column = 0; column < t.columns; ++column) {
      for (int64_t piece = 0; piece < t.pieces; ++piece) {
        Count& counter = counters(matrix, piece)[column];
        const Count size = counter;
        counter = number, number = Count(number + size);
      }
    }
  };
  const auto scatter = [&](int64_t matrix, int64_t piece) {
    Count* numbers = counters(matrix, piece);
    walk_piece(matrix, piece,
               [&](int64_t column, int64_t row, int64_t entry) { put(matrix, numbers[column]++, row, entry); });
  };
  if (t.pieces == 1) {
    core::parallel_for(queue, t.matrices,
                       [&](int64_t matrix, int) { count(matrix, 0), accumulate(matrix), scatter(matrix, 0); });
    return;
  }
  const int64_t tasks = t.matrices * t.pieces;
  core::parallel_for(queue, tasks, [&](int64_t task, int) { count(task / t.pieces, task % t.pieces); });
  core::parallel_for(queue, t.matrices, [&](int64_t matrix, int) { accumulate(matrix); });
  core::parallel_for(queue, tasks, [&](int64_t task, int) { scatter(task / t.pieces, task % t.pieces); });
}

}  // namespace subquad::cpu::SUBQUAD_ISA
