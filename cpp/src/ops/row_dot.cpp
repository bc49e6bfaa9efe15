#include "subquad/row_dot.h"

#include "core/registry.h"

namespace subquad {

void row_dot(const Queue& queue, ConstTensor x, ConstTensor y, ConstTensor z, Tensor out) {
  const char* const op = "row_dot";
  using core::kAny;
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(op, "x", queue, x, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
  const auto like_x = {core::Axis{"B", x.shape[0]}, {"H", x.shape[1]}, {"N", x.shape[2]}, {"D", x.shape[3]}};
  core::check_array(op, "y", queue, y, like_x, floats);
  if (z.defined()) core::check_array(op, "z", queue, z, like_x, floats);
  core::check_array(op, "out", queue, out, {{"B", x.shape[0]}, {"H", x.shape[1]}, {"N", x.shape[2]}}, {DType::f32});
  core::check_output(op, "out", out, {&x, &y, &z});
  RowDotArgs args = {};
  args.batch = x.shape[0], args.heads = x.shape[1], args.seq = x.shape[2], args.dim = x.shape[3];
  args.x = core::operand(x), args.y = core::operand(y), args.z = core::operand(z);
  args.out = core::operand(out);
  if (out.numel() > 0) core::launch(op, queue, &Kernels::row_dot, args, Workspace());
}

}  // namespace subquad
