#include "subquad/teacher_blocks.h"

#include "core/registry.h"
#include "ops/visible_check.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kOp = "teacher_blocks";

void check_sums(const char* argument, const Queue& queue, const Tensor& t, const TeacherBlocksArgs& args) {
  core::check_array(kOp, argument, queue, t, {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}}, {DType::f32});
}

TeacherBlocksArgs check(const Queue& queue, const ConstTensor& q, const ConstTensor& k, double scale,
                        const ConstTensor& visible, const ConstTensor& positions, const Tensor& masses,
                        const Tensor& sum_squares, const Tensor& sum_plogp) {
  core::check_array(kOp, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  core::check_not_empty(kOp, "q", "D", q.shape[3]);
  core::check_array(kOp, "k", queue, k, {{"B", q.shape[0]}, {"Hkv", kAny}, {"M", kAny}, {"D", q.shape[3]}}, {q.dtype});
  core::check_groups(kOp, "k", q.shape[1], k.shape[1]);
  ops::check_visible(kOp, queue, visible, positions, q.shape[0], q.shape[2], k.shape[2]);

  TeacherBlocksArgs args = {};
  args.batch = q.shape[0], args.heads_q = q.shape[1], args.heads_kv = k.shape[1];
  args.seq_q = q.shape[2], args.seq_k = k.shape[2], args.dim = q.shape[3];
  core::check_array(kOp, "masses", queue, masses,
                    {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}, {"K", kAny}}, {DType::f32});
  args.columns = masses.shape[3];
  core::check_range(kOp, "masses (axis K)", args.columns, 1, int64_t(1) << 20);
  check_sums("sum_squares", queue, sum_squares, args);
  check_sums("sum_plogp", queue, sum_plogp, args);
  core::check_output(kOp, "masses", masses, {&q, &k, &visible, &positions, &sum_squares, &sum_plogp});
  core::check_output(kOp, "sum_squares", sum_squares, {&q, &k, &visible, &positions, &masses, &sum_plogp});
  core::check_output(kOp, "sum_plogp", sum_plogp, {&q, &k, &visible, &positions, &masses, &sum_squares});

  args.scale = core::check_scale(kOp, "scale", scale, args.dim);
  args.q = core::operand(q), args.k = core::operand(k);
  args.visible = core::operand(visible), args.positions = core::operand(positions);
  args.masses = core::operand(masses);
  args.sum_squares = core::operand(sum_squares), args.sum_plogp = core::operand(sum_plogp);
  return args;
}

}  // namespace

void teacher_blocks(const Queue& queue, ConstTensor q, ConstTensor k, double scale, ConstTensor visible,
                    ConstTensor positions, Tensor masses, Tensor sum_squares, Tensor sum_plogp, Workspace workspace) {
  const TeacherBlocksArgs args = check(queue, q, k, scale, visible, positions, masses, sum_squares, sum_plogp);
  ops::check_visible_values(kOp, queue, args.visible, args.positions, args.batch, args.seq_q, args.seq_k);
  core::launch(kOp, queue, &Kernels::teacher_blocks, args, workspace);
}

int64_t teacher_blocks_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, double scale,
                                       ConstTensor visible, ConstTensor positions, Tensor masses, Tensor sum_squares,
                                       Tensor sum_plogp) {
  return core::workspace_bytes(kOp, queue, &Kernels::teacher_blocks,
                               check(queue, q, k, scale, visible, positions, masses, sum_squares, sum_plogp));
}

}  // namespace subquad
