#include "core/parallel.h"
#include "core/visit.h"
#include "cpu/simd.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

using Args = SumArraysArgs;

// Sums of a piece stay in the L1 cache until all terms are in.
constexpr int64_t kPiece = 1024;

/// Rows [row, row + rows) and columns [column, column + columns) of one head of the result.
struct Piece {
  int64_t b, h, row, rows, column, columns;
};

/// sum[0..n) = [sum +] factor x[0..n). The tail goes through a whole vector, so that no bit depends on where a row is
/// cut.
template <bool Add, class T>
void add_row(const T* x, float factor, float* sum, int64_t n) {
  const F32 f = set(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 value = load(x + i);
    store(sum + i, Add ? fma(f, value, load(sum + i)) : f * value);
  }
  for (; i < n; ++i) sum[i] = Add ? fma(f, set(to_float(x[i])), set(sum[i]))[0] : factor * to_float(x[i]);
}

template <bool Add, class T>
void add_rows(const T* x, int64_t stride, float factor, const Piece& p, float* sum) {
  for (int64_t r = 0; r < p.rows; ++r) add_row<Add>(x + r * stride, factor, sum + r * p.columns, p.columns);
}

/// Adds one term, or makes it the sum if nothing is there yet; true if there is something afterwards.
bool add_term(const SumArraysTerm& term, const Piece& p, float* sum, bool started) {
  const int64_t* stride = term.array.stride;
  visit_float(term.array.dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(term.array.data) + p.row * stride[2] + p.column;
    for (int64_t b = p.b; b < p.b + term.items; ++b) {
      for (int64_t h = p.h * term.group; h < (p.h + 1) * term.group; ++h) {
        const auto* from = x + b * stride[0] + h * stride[1];
        if (started)
          add_rows<true>(from, stride[2], term.factor, p, sum);
        else
          add_rows<false>(from, stride[2], term.factor, p, sum);
        started = true;
      }
    }
  });
  return started;
}

void sum_piece(const Args& a, const Piece& p) {
  alignas(64) float sum[kPiece];
  bool started = false;
  for (int i = 0; i < a.num_terms; ++i) started = add_term(a.terms[i], p, sum, started);
  if (!started) memset(sum, 0, sizeof sum);
  visit_float(a.out.dtype, [&](auto tag) {
    auto* out = static_cast<decltype(tag)*>(a.out.data) + p.b * a.out.stride[0] + p.h * a.out.stride[1];
    for (int64_t r = 0; r < p.rows; ++r)
      narrow(sum + r * p.columns, out + (p.row + r) * a.out.stride[2] + p.column, p.columns);
  });
}

/// Makes one long row of the rows of a head where every array has them behind each other.
Args with_long_rows(Args a) {
  bool dense = a.out.stride[2] == a.dim || a.seq == 1;
  for (int i = 0; i < a.num_terms; ++i) dense &= a.terms[i].array.stride[2] == a.dim || a.seq == 1;
  if (dense) a.dim *= a.seq, a.seq = 1;
  return a;
}

const char* run(const Queue& queue, const Args& args, void*) {
  const Args a = with_long_rows(args);
  const int64_t columns = smaller(a.dim, kPiece), rows = smaller(a.seq, kPiece / columns);
  const int64_t across = (a.dim + columns - 1) / columns, down = (a.seq + rows - 1) / rows;
  const int64_t pieces = a.batch * a.heads * down * across;
  int64_t arrays = 1;
  for (int i = 0; i < a.num_terms; ++i) arrays += a.terms[i].items * a.terms[i].group;
  // A task reads enough to pay for waking a thread.
  const int64_t pieces_a_task = 1 + 65536 / (rows * columns * arrays);
  core::parallel_for(queue, (pieces + pieces_a_task - 1) / pieces_a_task, [&](int64_t task, int) {
    const int64_t end = smaller((task + 1) * pieces_a_task, pieces);
    for (int64_t i = task * pieces_a_task; i < end; ++i) {
      const int64_t column = i % across * columns, row = i / across % down * rows, head = i / across / down;
      sum_piece(a, {head / a.heads, head % a.heads, row, smaller(rows, a.seq - row), column,
                    smaller(columns, a.dim - column)});
    }
  });
  return nullptr;
}

const char* supports(const Args&) { return nullptr; }

int64_t workspace_bytes(const Queue&, const Args&) { return 0; }

}  // namespace

const Slot<SumArraysArgs> sum_arrays_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
