#include "subquad/topk_select.h"

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kOp = "topk_select";

void check_indices(const Queue& queue, const Tensor& indices, const TopkSelectArgs& a) {
  const auto check = [&](std::initializer_list<core::Axis> axes) {
    core::check_array(kOp, "indices", queue, indices, axes, {DType::i32});
  };
  const core::Axis b = {"B", a.batch}, h = {"H", a.heads}, n = {"N", a.seq_q}, k = {"k", a.k};
  if (a.group == Group::query)
    check({b, h, n, k});
  else if (a.group == Group::row_heads)
    check({b, n, k});
  else if (a.group == Group::head)
    check({b, h, k});
  else
    check({b, k});
}

TopkSelectArgs check(const Queue& queue, const ConstTensor& scores, const TopkSelectOptions& options,
                     const Tensor& indices) {
  using core::kAny;
  core::check_array(kOp, "scores", queue, scores, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"M", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  core::check_range(kOp, "k", options.k, 1, INT32_MAX);
  TopkSelectArgs args = {};
  args.batch = scores.shape[0], args.heads = scores.shape[1], args.seq_q = scores.shape[2];
  args.seq_k = scores.shape[3], args.k = options.k, args.group = options.group, args.is_causal = options.is_causal;
  if (options.key_mask.defined())
    core::check_array(kOp, "key_mask", queue, options.key_mask, {{"B", args.batch}, {"M", args.seq_k}},
                      {DType::boolean});
  check_indices(queue, indices, args);
  core::check_output(kOp, "indices", indices, {&scores, &options.key_mask});
  args.scores = core::operand(scores), args.key_mask = core::operand(options.key_mask);
  args.indices = core::operand(indices);
  return args;
}

}  // namespace

void topk_select(const Queue& queue, ConstTensor scores, const TopkSelectOptions& options, Tensor indices,
                 Workspace workspace) {
  const TopkSelectArgs args = check(queue, scores, options, indices);
  if (indices.numel() > 0) core::launch(kOp, queue, &Kernels::topk_select, args, workspace);
}

int64_t topk_select_workspace_bytes(const Queue& queue, ConstTensor scores, const TopkSelectOptions& options,
                                    Tensor indices) {
  const TopkSelectArgs args = check(queue, scores, options, indices);
  return indices.numel() > 0 ? core::workspace_bytes(kOp, queue, &Kernels::topk_select, args) : 0;
}

}  // namespace subquad
