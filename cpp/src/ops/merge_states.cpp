#include "subquad/merge_states.h"

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kForward = "merge_states";
const char* const kBackward = "merge_states_bwd";

void check_rows(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                const MergeStatesArgs& args) {
  core::check_array(op, argument, queue, t, {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}, {"E", args.dim}},
                    {DType::f32, DType::f16, DType::bf16});
}

void check_lse(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
               const MergeStatesArgs& args) {
  core::check_array(op, argument, queue, t, {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}}, {DType::f32});
}

/// Checks the two states; the other arrays take their shape from the first.
MergeStatesArgs check_states(const char* op, const Queue& queue, const ConstTensor& out1, const ConstTensor& lse1,
                             const ConstTensor& out2, const ConstTensor& lse2) {
  MergeStatesArgs args = {};
  args.batch = args.heads = args.seq = args.dim = core::kAny;
  check_rows(op, "out1", queue, out1, args);
  if (out1.shape[3] == 0) core::invalid(op, "out1", "E of at least 1", "0");
  args.batch = out1.shape[0], args.heads = out1.shape[1], args.seq = out1.shape[2], args.dim = out1.shape[3];
  check_lse(op, "lse1", queue, lse1, args);
  check_rows(op, "out2", queue, out2, args);
  check_lse(op, "lse2", queue, lse2, args);
  args.out1 = core::operand(out1), args.lse1 = core::operand(lse1);
  args.out2 = core::operand(out2), args.lse2 = core::operand(lse2);
  return args;
}

}  // namespace

void merge_states(const Queue& queue, ConstTensor out1, ConstTensor lse1, ConstTensor out2, ConstTensor lse2,
                  Tensor out, Tensor lse) {
  MergeStatesArgs args = check_states(kForward, queue, out1, lse1, out2, lse2);
  check_rows(kForward, "out", queue, out, args);
  check_lse(kForward, "lse", queue, lse, args);
  core::check_output(kForward, "out", out, {&out1, &lse1, &out2, &lse2, &lse});
  core::check_output(kForward, "lse", lse, {&out1, &lse1, &out2, &lse2, &out});
  args.out = core::operand(out), args.lse = core::operand(lse);
  if (lse.numel() > 0) core::launch(kForward, queue, &Kernels::merge_states, args, Workspace());
}

void merge_states_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor out1, ConstTensor lse1,
                      ConstTensor out2, ConstTensor lse2, Tensor dout1, Tensor dlse1, Tensor dout2, Tensor dlse2) {
  MergeStatesArgs args = check_states(kBackward, queue, out1, lse1, out2, lse2);
  check_rows(kBackward, "dout", queue, dout, args);
  if (dlse.defined()) check_lse(kBackward, "dlse", queue, dlse, args);
  check_rows(kBackward, "dout1", queue, dout1, args);
  check_lse(kBackward, "dlse1", queue, dlse1, args);
  check_rows(kBackward, "dout2", queue, dout2, args);
  check_lse(kBackward, "dlse2", queue, dlse2, args);
  const auto check_result = [&](const char* argument, const Tensor& result,
                                std::initializer_list<const ConstTensor*> results) {
    core::check_output(kBackward, argument, result, {&dout, &dlse, &out1, &lse1, &out2, &lse2});
    core::check_output(kBackward, argument, result, results);
  };
  check_result("dout1", dout1, {&dlse1, &dout2, &dlse2});
  check_result("dlse1", dlse1, {&dout1, &dout2, &dlse2});
  check_result("dout2", dout2, {&dout1, &dlse1, &dlse2});
  check_result("dlse2", dlse2, {&dout1, &dlse1, &dout2});
  args.dout = core::operand(dout), args.dlse = core::operand(dlse);
  args.dout1 = core::operand(dout1), args.dlse1 = core::operand(dlse1);
  args.dout2 = core::operand(dout2), args.dlse2 = core::operand(dlse2);
  if (lse1.numel() > 0) core::launch(kBackward, queue, &Kernels::merge_states_bwd, args, Workspace());
}

}  // namespace subquad
