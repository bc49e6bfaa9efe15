#include "cpu/column_cursor.h"
#include "cpu/table.h"
#include "cpu/visible_tile.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

void expand_row(const float* x, int64_t columns, const int32_t* positions, int64_t visible, int64_t keys, float* y) {
  memset(y, 0, size_t(keys) * sizeof(float));
  ColumnCursor at = first_column(visible, columns);
  for (int64_t rank = 0; rank < visible; ++rank) {
    seek(at, rank);
    y[key_of(positions, rank)] = x[at.column];
  }
}

const char* supports(const ExpandValuesArgs&) { return nullptr; }

int64_t workspace_bytes(const Queue&, const ExpandValuesArgs&) { return 0; }

const char* run(const Queue& queue, const ExpandValuesArgs& a, void*) {
  for_each_visible_row(queue, a, [&](int64_t b, int64_t h, int64_t n) {
    expand_row(element<float>(a.x, b, h, n), a.columns, item_of(a.positions, b), item_of(a.visible, b)[n], a.seq_k,
               element<float>(a.y, b, h, n));
  });
  return nullptr;
}

}  // namespace

const Slot<ExpandValuesArgs> expand_values_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
