#include "subquad/l2_normalize.h"

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

/// Checks one array of shape [B, H, N, D] against the extents in `args`.
void check_rows(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                const L2NormalizeArgs& args) {
  core::check_array(op, argument, queue, t, {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}, {"D", args.dim}},
                    {DType::f32, DType::f16, DType::bf16});
}

/// Checks `first`, from which the other arrays take their shape.
L2NormalizeArgs check_first(const char* op, const char* argument, const Queue& queue, const ConstTensor& first) {
  L2NormalizeArgs args = {kAny, kAny, kAny, kAny, {}, {}, {}, {}, {}};
  check_rows(op, argument, queue, first, args);
  if (first.shape[3] == 0) core::invalid(op, argument, "a head dimension of at least 1", "0");
  args.batch = first.shape[0], args.heads = first.shape[1], args.seq = first.shape[2], args.dim = first.shape[3];
  return args;
}

void check_lse(const char* op, const Queue& queue, const ConstTensor& lse, const L2NormalizeArgs& args) {
  core::check_array(op, "lse", queue, lse, {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}}, {DType::f32});
}

bool same_view(const ConstTensor& a, const ConstTensor& b) {
  bool same = a.data == b.data && a.dtype == b.dtype;
  for (int i = 0; i < 4; ++i) same &= a.stride[i] == b.stride[i] || a.shape[i] == 1;
  return same;
}

bool empty(const L2NormalizeArgs& args) { return args.batch == 0 || args.heads == 0 || args.seq == 0; }

}  // namespace

void l2_normalize(const Queue& queue, ConstTensor x, Tensor y, Tensor lse) {
  const char* const op = "l2_normalize";
  L2NormalizeArgs args = check_first(op, "x", queue, x);
  check_rows(op, "y", queue, y, args);
  const ConstTensor none;
  core::check_output(op, "y", y, {same_view(x, y) ? &none : &x});
  if (lse.defined()) check_lse(op, queue, lse, args);
  core::check_output(op, "lse", lse, {&x, &y});
  args.x = core::operand(x);
  args.y = core::operand(y);
  args.lse = core::operand(lse);
  if (!empty(args)) core::launch(op, queue, &Kernels::l2_normalize, args, Workspace());
}

void l2_normalize_bwd(const Queue& queue, ConstTensor dy, ConstTensor y, ConstTensor lse, Tensor dx) {
  const char* const op = "l2_normalize_bwd";
  L2NormalizeArgs args = check_first(op, "dy", queue, dy);
  check_rows(op, "y", queue, y, args);
  check_lse(op, queue, lse, args);
  check_rows(op, "dx", queue, dx, args);
  core::check_output(op, "dx", dx, {&dy, &y, &lse});
  args.dy = core::operand(dy);
  args.y = core::operand(y);
  args.lse = core::operand(lse);
  args.dx = core::operand(dx);
  if (!empty(args)) core::launch(op, queue, &Kernels::l2_normalize_bwd, args, Workspace());
}

}  // namespace subquad
