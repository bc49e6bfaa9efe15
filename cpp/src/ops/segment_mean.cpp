#include "subquad/segment_mean.h"

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "segment_mean";
const char* const kBackward = "segment_mean_bwd";

/// Checks x of the forward pass, or what has its shape in the backward pass, and the options.
SegmentMeanArgs check_inputs(const char* op, const char* argument, const Queue& queue, const ConstTensor& x,
                             const SegmentMeanOptions& options) {
  core::check_array(op, argument, queue, x, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  if (x.shape[3] == 0) core::invalid(op, argument, "D of at least 1", "0");
  SegmentMeanArgs args = {};
  args.batch = x.shape[0], args.heads = x.shape[1], args.seq = x.shape[2], args.dim = x.shape[3];
  const int64_t number = options.num_segments, size = options.segment_size;
  if (number < 0 || size < 0 || (number > 0) == (size > 0))
    core::invalid(op, "num_segments", "one of num_segments and segment_size above 0 and the other 0",
                  std::to_string(number) + " and " + std::to_string(size));
  args.segments = size > 0 ? args.seq / size + (args.seq % size > 0) : number;
  args.segment_size = size, args.seq_paired = -1, args.unit_counts = options.unit_counts;
  if (options.mask.defined())
    core::check_array(op, "mask", queue, options.mask, {{"B", args.batch}, {"N", args.seq}}, {DType::boolean});
  if (options.paired_mask.defined()) {
    if (size > 0) core::invalid(op, "paired_mask", "none together with segment_size", "an array");
    core::check_array(op, "paired_mask", queue, options.paired_mask, {{"B", args.batch}, {"N'", kAny}},
                      {DType::boolean});
    args.seq_paired = options.paired_mask.shape[1];
  }
  args.mask = core::operand(options.mask), args.paired_mask = core::operand(options.paired_mask);
  return args;
}

void check_means(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                 const SegmentMeanArgs& args) {
  core::check_array(op, argument, queue, t,
                    {{"B", args.batch}, {"H", args.heads}, {"C", args.segments}, {"D", args.dim}},
                    {DType::f32, DType::f16, DType::bf16});
}

SegmentMeanArgs check_forward(const Queue& queue, const ConstTensor& x, const SegmentMeanOptions& options,
                              const Tensor& out, const Tensor& counts) {
  SegmentMeanArgs args = check_inputs(kForward, "x", queue, x, options);
  check_means(kForward, "out", queue, out, args);
  core::check_output(kForward, "out", out, {&x, &options.mask, &options.paired_mask, &counts});
  if (counts.defined())
    core::check_array(kForward, "counts", queue, counts, {{"B", args.batch}, {"C", args.segments}},
                      {DType::i32, DType::f32});
  core::check_output(kForward, "counts", counts, {&x, &options.mask, &options.paired_mask, &out});
  args.x = core::operand(x), args.out = core::operand(out), args.counts = core::operand(counts);
  return args;
}

SegmentMeanArgs check_backward(const Queue& queue, const ConstTensor& dout, const ConstTensor& base,
                               const SegmentMeanOptions& options, const Tensor& dx) {
  SegmentMeanArgs args = check_inputs(kBackward, "dx", queue, dx, options);
  check_means(kBackward, "dout", queue, dout, args);
  if (base.defined())
    core::check_array(kBackward, "base", queue, base,
                      {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}, {"D", args.dim}},
                      {DType::f32, DType::f16, DType::bf16});
  core::check_output(kBackward, "dx", dx, {&dout, &base, &options.mask, &options.paired_mask});
  args.dout = core::operand(dout), args.base = core::operand(base), args.dx = core::operand(dx);
  return args;
}

/// Without heads there are still counts to write.
bool empty(const SegmentMeanArgs& args) { return args.batch == 0 || args.segments == 0; }

}  // namespace

void segment_mean(const Queue& queue, ConstTensor x, const SegmentMeanOptions& options, Tensor out, Tensor counts,
                  Workspace workspace) {
  const SegmentMeanArgs args = check_forward(queue, x, options, out, counts);
  if (!empty(args)) core::launch(kForward, queue, &Kernels::segment_mean, args, workspace);
}

int64_t segment_mean_workspace_bytes(const Queue& queue, ConstTensor x, const SegmentMeanOptions& options, Tensor out,
                                     Tensor counts) {
  const SegmentMeanArgs args = check_forward(queue, x, options, out, counts);
  return empty(args) ? 0 : core::workspace_bytes(kForward, queue, &Kernels::segment_mean, args);
}

void segment_mean_bwd(const Queue& queue, ConstTensor dout, ConstTensor base, const SegmentMeanOptions& options,
                      Tensor dx, Workspace workspace) {
  const SegmentMeanArgs args = check_backward(queue, dout, base, options, dx);
  if (!empty(args)) core::launch(kBackward, queue, &Kernels::segment_mean_bwd, args, workspace);
}

int64_t segment_mean_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor base,
                                         const SegmentMeanOptions& options, Tensor dx) {
  const SegmentMeanArgs args = check_backward(queue, dout, base, options, dx);
  return empty(args) ? 0 : core::workspace_bytes(kBackward, queue, &Kernels::segment_mean_bwd, args);
}

}  // namespace subquad
