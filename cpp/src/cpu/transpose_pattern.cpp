#include "cpu/table.h"
#include "cpu/transpose.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = TransposePatternArgs;

Transposition plan(const Queue& queue, const Args& a) {
  return plan_transposition(queue, a.batch * a.heads, a.seq_q, a.seq_k);
}

template <class Index>
void transpose(const Queue& queue, const Args& a, int64_t* early) {
  const Index* indptr = static_cast<const Index*>(a.pattern.indptr.data);
  const int32_t* keys = static_cast<const int32_t*>(a.pattern.indices.data);
  int64_t* key_indptr = static_cast<int64_t*>(a.key_indptr.data);
  int32_t* rows = static_cast<int32_t*>(a.rows.data);
  int64_t* order = static_cast<int64_t*>(a.order.data);
  const auto walk = [&](int64_t matrix, int64_t begin, int64_t end, auto&& f) {
    const Index* bounds = indptr + matrix * a.seq_q;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t entry = bounds[row]; entry < bounds[row + 1]; ++entry) f(keys[entry], row, entry);
  };
  key_indptr[0] = 0;
  transpose_entries(
      queue, plan(queue, a), early, key_indptr + 1, [&](int64_t matrix) { return indptr[matrix * a.seq_q]; }, walk,
      [&](int64_t, int64_t number, int64_t row, int64_t entry) { rows[number] = int32_t(row), order[number] = entry; });
}

const char* supports(const Args& a) { return a.seq_q > INT32_MAX ? "more than 2^31 - 1 queries" : nullptr; }

int64_t workspace_bytes(const Queue& queue, const Args& a) {
  Arena arena = {};
  take<int64_t>(arena, early_counters(plan(queue, a)));
  return with_alignment(arena);
}

const char* run(const Queue& queue, const Args& a, void* workspace) {
  Arena arena = arena_at(workspace);
  int64_t* early = take<int64_t>(arena, early_counters(plan(queue, a)));
  a.pattern.indptr.dtype == DType::i32 ? transpose<int32_t>(queue, a, early) : transpose<int64_t>(queue, a, early);
  return nullptr;
}

}  // namespace

const Slot<TransposePatternArgs> transpose_pattern_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
