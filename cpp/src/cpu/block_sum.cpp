#include "cpu/column_cursor.h"
#include "cpu/table.h"
#include "cpu/visible_tile.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

void sum_row(const float* y, const int32_t* positions, int64_t visible, int64_t columns, float* x) {
  memset(x, 0, size_t(columns) * sizeof(float));
  ColumnCursor at = first_column(visible, columns);
  for (int64_t rank = 0; rank < visible; ++rank) {
    seek(at, rank);
    x[at.column] += y[key_of(positions, rank)];
  }
}

const char* supports(const BlockSumArgs&) { return nullptr; }

int64_t workspace_bytes(const Queue&, const BlockSumArgs&) { return 0; }

const char* run(const Queue& queue, const BlockSumArgs& a, void*) {
  for_each_visible_row(queue, a, [&](int64_t b, int64_t h, int64_t n) {
    sum_row(element<float>(a.y, b, h, n), item_of(a.positions, b), item_of(a.visible, b)[n], a.columns,
            element<float>(a.x, b, h, n));
  });
  return nullptr;
}

}  // namespace

const Slot<BlockSumArgs> block_sum_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
