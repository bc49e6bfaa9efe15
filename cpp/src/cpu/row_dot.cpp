#include "core/parallel.h"
#include "core/visit.h"
#include "cpu/table.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

constexpr int64_t kPiece = 512;  // of a row, widened to floats at a time

void widen_piece(const Operand& x, int64_t offset, int64_t count, float* to) {
  visit_float(x.dtype, [&](auto tag) { widen_padded(static_cast<const decltype(tag)*>(x.data) + offset, to, count); });
}

int64_t row_at(const Operand& x, int64_t b, int64_t h, int64_t n) {
  return b * x.stride[0] + h * x.stride[1] + n * x.stride[2];
}

float dot_of_row(const RowDotArgs& a, int64_t b, int64_t h, int64_t n) {
  alignas(64) float x[kPiece], y[kPiece], z[kPiece];
  float sum = 0;
  for (int64_t first = 0; first < a.dim; first += kPiece) {
    const int64_t count = smaller(kPiece, a.dim - first);
    widen_piece(a.x, row_at(a.x, b, h, n) + first, count, x);
    widen_piece(a.y, row_at(a.y, b, h, n) + first, count, y);
    if (a.z.data) {
      widen_piece(a.z, row_at(a.z, b, h, n) + first, count, z);
      for (int64_t i = 0; i < padded(count); i += kLanes) store(y + i, load(y + i) - load(z + i));
    }
    sum += dot(x, y, padded(count));
  }
  return sum;
}

const char* supports(const RowDotArgs&) { return nullptr; }

int64_t workspace_bytes(const Queue&, const RowDotArgs&) { return 0; }

const char* run(const Queue& queue, const RowDotArgs& a, void*) {
  const int64_t rows = a.batch * a.heads * a.seq;
  const int64_t rows_a_task = 1 + 16384 / (a.dim + 16);
  core::parallel_for(queue, (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    const int64_t begin = task * rows_a_task, end = smaller(rows, begin + rows_a_task);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / a.seq / a.heads, h = row / a.seq % a.heads, n = row % a.seq;
      static_cast<float*>(a.out.data)[row_at(a.out, b, h, n)] = dot_of_row(a, b, h, n);
    }
  });
  return nullptr;
}

}  // namespace

const Slot<RowDotArgs> row_dot_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
