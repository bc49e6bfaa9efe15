#include "core/parallel.h"
#include "cpu/sparse_rows.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = ExpandBlocksArgs;

// Of a few entries each, so that a task is worth its start.
constexpr int64_t kRowsOfTask = 128;

/// Calls f(row r = (b H + h) N + n, its pattern) for all rows, on all threads.
template <class F>
void for_each_pattern_row(const Queue& queue, const Args& a, F&& f) {
  const int64_t rows = a.batch * a.heads * a.seq_q;
  core::parallel_for(queue, (rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task, int) {
    for (int64_t r = task * kRowsOfTask; r < smaller(rows, (task + 1) * kRowsOfTask); ++r)
      f(r, pattern_row(a.pattern, a.heads, a.seq_q, r / a.seq_q / a.heads, r / a.seq_q % a.heads, r % a.seq_q));
  });
}

const char* supports(const Args& a) { return a.seq_k > INT32_MAX ? "2^31 keys or more" : nullptr; }

int64_t workspace_bytes(const Queue&, const Args&) { return 0; }

const char* run_indptr(const Queue& queue, const Args& a, void*) {
  int64_t* indptr = static_cast<int64_t*>(a.indptr.data);
  indptr[0] = 0;
  for_each_pattern_row(queue, a, [&](int64_t r, const PatternRow& row) { indptr[r + 1] = count_slots(row); });
  for (int64_t r = 0; r < a.batch * a.heads * a.seq_q; ++r) indptr[r + 1] += indptr[r];
  return nullptr;
}

const char* run(const Queue& queue, const Args& a, void*) {
  const int64_t* indptr = static_cast<const int64_t*>(a.indptr.data);
  int32_t* indices = static_cast<int32_t*>(a.indices.data);
  for_each_pattern_row(queue, a, [&](int64_t r, const PatternRow& row) {
    EntryBuffer buffer;
    Entries piece;
    // Never more than the row's part, even where indptr is not that of the pattern.
    int64_t to = indptr[r];
    for (RowCursor cursor = {}; to < indptr[r + 1] && next_piece(row, cursor, buffer, piece); to += piece.count)
      memcpy(indices + to, piece.keys, size_t(smaller(piece.count, indptr[r + 1] - to)) * sizeof(int32_t));
  });
  return nullptr;
}

}  // namespace

const Slot<ExpandBlocksArgs> expand_blocks_indptr_slot = {supports, workspace_bytes, run_indptr};
const Slot<ExpandBlocksArgs> expand_blocks_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
