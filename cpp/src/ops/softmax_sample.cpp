#include "subquad/softmax_sample.h"

#include <cmath>

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kOp = "softmax_sample";

SoftmaxSampleArgs check(const Queue& queue, const ConstTensor& q, const ConstTensor& k,
                        const SoftmaxSampleOptions& options, const Tensor& indices) {
  using core::kAny;
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(kOp, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
  if (q.shape[3] == 0) core::invalid(kOp, "q", "D of at least 1", "0");
  core::check_array(kOp, "k", queue, k, {{"B", q.shape[0]}, {"Hkv", kAny}, {"M", kAny}, {"D", q.shape[3]}}, floats);
  core::check_groups(kOp, "k", q.shape[1], k.shape[1]);
  if (!std::isfinite(options.scale) || options.scale < 0)
    core::invalid(kOp, "scale", "a finite number above 0, or 0 for D^-1/2", std::to_string(options.scale));
  core::check_range(kOp, "num_samples", options.num_samples, 1, INT32_MAX);
  if (options.key_mask.defined())
    core::check_array(kOp, "key_mask", queue, options.key_mask, {{"B", q.shape[0]}, {"M", k.shape[2]}},
                      {DType::boolean});
  core::check_array(kOp, "indices", queue, indices,
                    {{"B", q.shape[0]}, {"H", q.shape[1]}, {"S", options.num_samples}, {"N", q.shape[2]}},
                    {DType::i32});
  core::check_output(kOp, "indices", indices, {&q, &k, &options.key_mask});
  SoftmaxSampleArgs args = {};
  args.batch = q.shape[0], args.heads_q = q.shape[1], args.heads_kv = k.shape[1], args.samples = options.num_samples;
  args.seq_q = q.shape[2], args.seq_k = k.shape[2], args.dim = q.shape[3];
  args.scale = float(options.scale > 0 ? options.scale : 1 / std::sqrt(double(args.dim)));
  args.seed = options.seed.value, args.seed_ptr = options.seed.pointer;
  args.q = core::operand(q), args.k = core::operand(k), args.key_mask = core::operand(options.key_mask);
  args.indices = core::operand(indices);
  return args;
}

}  // namespace

void softmax_sample(const Queue& queue, ConstTensor q, ConstTensor k, const SoftmaxSampleOptions& options,
                    Tensor indices, Workspace workspace) {
  const SoftmaxSampleArgs args = check(queue, q, k, options, indices);
  if (indices.numel() > 0) core::launch(kOp, queue, &Kernels::softmax_sample, args, workspace);
}

int64_t softmax_sample_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k,
                                       const SoftmaxSampleOptions& options, Tensor indices) {
  const SoftmaxSampleArgs args = check(queue, q, k, options, indices);
  return indices.numel() > 0 ? core::workspace_bytes(kOp, queue, &Kernels::softmax_sample, args) : 0;
}

}  // namespace subquad
