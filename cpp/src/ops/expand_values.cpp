#include "subquad/expand_values.h"

#include "core/registry.h"
#include "ops/visible_check.h"

namespace subquad {

void expand_values(const Queue& queue, ConstTensor x, ConstTensor visible, ConstTensor positions, Tensor y) {
  const char* const op = "expand_values";
  using core::kAny;
  core::check_array(op, "x", queue, x, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"K", kAny}}, {DType::f32});
  core::check_array(op, "y", queue, y, {{"B", x.shape[0]}, {"H", x.shape[1]}, {"N", x.shape[2]}, {"M", kAny}},
                    {DType::f32});
  ExpandValuesArgs args = {};
  args.batch = x.shape[0], args.heads = x.shape[1], args.seq_q = x.shape[2];
  args.seq_k = y.shape[3], args.columns = x.shape[3];
  core::check_not_empty(op, "x", "K", args.columns);
  ops::check_visible(op, queue, visible, positions, args.batch, args.seq_q, args.seq_k);
  core::check_output(op, "y", y, {&x, &visible, &positions});
  args.x = core::operand(x), args.y = core::operand(y);
  args.visible = core::operand(visible), args.positions = core::operand(positions);
  ops::check_visible_values(op, queue, args.visible, args.positions, args.batch, args.seq_q, args.seq_k);
  if (y.numel() > 0) core::launch(op, queue, &Kernels::expand_values, args, Workspace());
}

}  // namespace subquad
