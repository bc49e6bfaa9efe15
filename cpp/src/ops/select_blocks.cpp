#include "subquad/select_blocks.h"

#include <cmath>

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kOp = "select_blocks";

SelectBlocksArgs check(const Queue& queue, const ConstTensor& probs, const ConstTensor& visible,
                       const SelectBlocksOptions& options, const Tensor& bits) {
  using core::kAny;
  core::check_array(kOp, "probs", queue, probs, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"K", kAny}}, {DType::f32});
  SelectBlocksArgs args = {};
  args.batch = probs.shape[0], args.heads = probs.shape[1], args.seq_q = probs.shape[2], args.columns = probs.shape[3];
  if (args.columns < 1 || args.columns > int64_t(1) << 20)
    core::invalid(kOp, "probs", "K in [1, 1048576]", std::to_string(args.columns));
  core::check_array(kOp, "visible", queue, visible, {{"B", args.batch}, {"N", args.seq_q}}, {DType::i32});
  if (!(options.top_k >= 1 && std::isfinite(options.top_k)))
    core::invalid(kOp, "top_k", "a finite number of at least 1", std::to_string(options.top_k));
  core::check_array(kOp, "bits", queue, bits,
                    {{"B", args.batch}, {"H", args.heads}, {"N", args.seq_q}, {"ceil(K / 8)", (args.columns + 7) / 8}},
                    {DType::u8});
  core::check_output(kOp, "bits", bits, {&probs, &visible});
  args.top_k = options.top_k, args.group = options.group, args.budget = options.budget;
  args.skip_dead = options.skip_dead;
  args.probs = core::operand(probs), args.visible = core::operand(visible), args.bits = core::operand(bits);
  return args;
}

void check_counts(const ConstTensor& visible) {
  if (visible.device.type != DeviceType::cpu) return;
  for (int64_t b = 0; b < visible.shape[0]; ++b) {
    const int32_t* row = static_cast<const int32_t*>(visible.data) + b * visible.stride[0];
    for (int64_t n = 0; n < visible.shape[1]; ++n)
      if (row[n] < 0)
        core::invalid(kOp, "visible", "values of at least 0", std::to_string(row[n]) + core::at_place({b, n}));
  }
}

}  // namespace

void select_blocks(const Queue& queue, ConstTensor probs, ConstTensor visible, const SelectBlocksOptions& options,
                   Tensor bits, Workspace workspace) {
  const SelectBlocksArgs args = check(queue, probs, visible, options, bits);
  check_counts(visible);
  if (bits.numel() > 0) core::launch(kOp, queue, &Kernels::select_blocks, args, workspace);
}

int64_t select_blocks_workspace_bytes(const Queue& queue, ConstTensor probs, ConstTensor visible,
                                      const SelectBlocksOptions& options, Tensor bits) {
  const SelectBlocksArgs args = check(queue, probs, visible, options, bits);
  return bits.numel() > 0 ? core::workspace_bytes(kOp, queue, &Kernels::select_blocks, args) : 0;
}

}  // namespace subquad
