#include "core/parallel.h"
#include "core/visit.h"
#include "cpu/table.h"
#include "cpu/unit_row.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

struct Place {
  int64_t b, h, n;
};

int64_t at(const Operand& x, const Place& p) { return p.b * x.stride[0] + p.h * x.stride[1] + p.n * x.stride[2]; }

/// Calls body(place) for every row, in parallel; a task is long enough to pay for waking a thread.
template <class F>
void for_each_row(const Queue& queue, const L2NormalizeArgs& args, F&& body) {
  const int64_t rows = args.batch * args.heads * args.seq;
  const int64_t rows_a_task = 1 + 16384 / (args.dim + 16);
  core::parallel_for(queue, (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    const int64_t begin = task * rows_a_task, end = begin + rows_a_task < rows ? begin + rows_a_task : rows;
    Place place = {begin / args.seq / args.heads, begin / args.seq % args.heads, begin % args.seq};
    for (int64_t row = begin; row < end; ++row) {
      body(place);
      if (++place.n == args.seq) place.n = 0, ++place.h;
      if (place.h == args.heads) place.h = 0, ++place.b;
    }
  });
}

const char* run_forward(const Queue& queue, const L2NormalizeArgs& args, void*) {
  const int64_t size = padded(args.dim);
  visit_float(args.x.dtype, [&](auto x_tag) {
    visit_float(args.y.dtype, [&](auto y_tag) {
      const auto* x = static_cast<const decltype(x_tag)*>(args.x.data);
      auto* y = static_cast<decltype(y_tag)*>(args.y.data);
      float* lse = static_cast<float*>(args.lse.data);
      for_each_row(queue, args, [&](const Place& place) {
        alignas(64) float row[kMaxHeadDim];
        widen_padded(x + at(args.x, place), row, args.dim);
        const Length length = normalize_row(row, size);
        narrow(row, y + at(args.y, place), args.dim);
        if (lse) lse[at(args.lse, place)] = log_length(length);
      });
    });
  });
  return nullptr;
}

/// row = (row - y <y, row>) * e^-lse
void project_row(float* row, const float* y, int64_t size, float lse) {
  const F32 along = set(dot(y, row, size));
  for (int64_t i = 0; i < size; i += kLanes) store(row + i, fma(-along, load(y + i), load(row + i)));
  const Length inverse = exp_length(-lse);
  scale_row(row, size, inverse.significand);
  scale_row_by_power(row, size, inverse.exponent);
}

const char* run_backward(const Queue& queue, const L2NormalizeArgs& args, void*) {
  const int64_t size = padded(args.dim);
  const float* lse = static_cast<const float*>(args.lse.data);
  visit_float(args.dy.dtype, [&](auto dy_tag) {
    visit_float(args.y.dtype, [&](auto y_tag) {
      const auto* dy = static_cast<const decltype(dy_tag)*>(args.dy.data);
      const auto* y = static_cast<const decltype(y_tag)*>(args.y.data);
      for_each_row(queue, args, [&](const Place& place) {
        alignas(64) float row[kMaxHeadDim], unit[kMaxHeadDim];
        const float length = lse[at(args.lse, place)];
        if (length == bits_to_float(0xff800000u)) {
          for (int64_t i = 0; i < size; ++i) row[i] = 0;
        } else {
          widen_padded(dy + at(args.dy, place), row, args.dim);
          widen_padded(y + at(args.y, place), unit, args.dim);
          project_row(row, unit, size, length);
        }
        visit_float(args.dx.dtype, [&](auto dx_tag) {
          narrow(row, static_cast<decltype(dx_tag)*>(args.dx.data) + at(args.dx, place), args.dim);
        });
      });
    });
  });
  return nullptr;
}

const char* supports(const L2NormalizeArgs& args) { return args.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue&, const L2NormalizeArgs&) { return 0; }

}  // namespace

const Slot<L2NormalizeArgs> l2_normalize_slot = {supports, workspace_bytes, run_forward};
const Slot<L2NormalizeArgs> l2_normalize_bwd_slot = {supports, workspace_bytes, run_backward};

}  // namespace subquad::cpu::SUBQUAD_ISA
