#include "core/parallel.h"
#include "cpu/table.h"
#include "cpu/tile.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = VisibleKeysArgs;

void count_keys(const Args& a, int64_t b) {
  const bool *keep = mask_of(a.key_mask, b), *rows = mask_of(a.query_mask, b);
  int32_t* counts = element<int32_t>(a.counts, b);
  int64_t kept = 0, end = 0;  // of the keys [0, end)
  for (int64_t n = 0; n < a.seq_q; ++n) {
    const int64_t seen = a.is_causal ? larger(0, n + a.seq_k - a.seq_q + 1) : a.seq_k;
    if (seen > end) kept += count_kept(keep, end, seen), end = seen;
    counts[n] = rows && !rows[n] ? 0 : int32_t(kept);
  }
}

void list_keys(const Args& a, int64_t b) {
  const bool* keep = mask_of(a.key_mask, b);
  int32_t* positions = element<int32_t>(a.positions, b);
  int64_t rank = 0;
  for (int64_t m = 0; m < a.seq_k; ++m) {
    // rank <= m, so that a key which does not count is written over or made -1 below.
    positions[rank] = int32_t(m);
    rank += !keep || keep[m];
  }
  for (; rank < a.seq_k; ++rank) positions[rank] = -1;
}

const char* run(const Queue& queue, const Args& a, void*) {
  core::parallel_for(queue, a.batch, [&](int64_t b, int) {
    count_keys(a, b);
    if (a.positions.data) list_keys(a, b);
  });
  return nullptr;
}

const char* supports(const Args&) { return nullptr; }

int64_t workspace_bytes(const Queue&, const Args&) { return 0; }

}  // namespace

const Slot<VisibleKeysArgs> visible_keys_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
