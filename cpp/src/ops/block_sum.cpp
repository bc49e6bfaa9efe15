#include "subquad/block_sum.h"

#include "core/registry.h"
#include "ops/visible_check.h"

namespace subquad {

void block_sum(const Queue& queue, ConstTensor y, ConstTensor visible, ConstTensor positions, Tensor x) {
  const char* const op = "block_sum";
  using core::kAny;
  core::check_array(op, "y", queue, y, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"M", kAny}}, {DType::f32});
  core::check_array(op, "x", queue, x, {{"B", y.shape[0]}, {"H", y.shape[1]}, {"N", y.shape[2]}, {"K", kAny}},
                    {DType::f32});
  BlockSumArgs args = {};
  args.batch = y.shape[0], args.heads = y.shape[1], args.seq_q = y.shape[2];
  args.seq_k = y.shape[3], args.columns = x.shape[3];
  core::check_not_empty(op, "x", "K", args.columns);
  ops::check_visible(op, queue, visible, positions, args.batch, args.seq_q, args.seq_k);
  core::check_output(op, "x", x, {&y, &visible, &positions});
  args.x = core::operand(x), args.y = core::operand(y);
  args.visible = core::operand(visible), args.positions = core::operand(positions);
  ops::check_visible_values(op, queue, args.visible, args.positions, args.batch, args.seq_q, args.seq_k);
  if (x.numel() > 0) core::launch(op, queue, &Kernels::block_sum, args, Workspace());
}

}  // namespace subquad
