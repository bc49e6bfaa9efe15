#include "subquad/sampled_proposals.h"

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "sampled_proposals";
const char* const kBackward = "sampled_proposals_bwd";

/// An array with the axis s third as kernels take it: that axis apart.
Operand without_samples(const ConstTensor& t, int64_t* sample_stride) {
  Operand o = core::operand(t);
  *sample_stride = o.stride[2];
  o.stride[2] = t.stride[3], o.stride[3] = 1;
  return o;
}

/// What both passes share: q, k and the indices.
SampledProposalsArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& q, const ConstTensor& k,
                                  const ConstTensor& indices) {
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(op, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
  if (q.shape[3] == 0) core::invalid(op, "q", "D of at least 1", "0");
  core::check_array(op, "k", queue, k, {{"B", q.shape[0]}, {"Hkv", kAny}, {"M", kAny}, {"D", q.shape[3]}}, floats);
  core::check_groups(op, "k", q.shape[1], k.shape[1]);
  core::check_array(op, "indices", queue, indices,
                    {{"B", q.shape[0]}, {"H", q.shape[1]}, {"S", kAny}, {"N", q.shape[2]}}, {DType::i32});
  SampledProposalsArgs args = {};
  args.batch = q.shape[0], args.heads_q = q.shape[1], args.heads_kv = k.shape[1], args.samples = indices.shape[2];
  args.seq_q = q.shape[2], args.seq_k = k.shape[2], args.dim = q.shape[3];
  args.q = core::operand(q), args.k = core::operand(k);
  args.indices = without_samples(indices, &args.sample_stride.indices);
  return args;
}

void check_samples(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                   const SampledProposalsArgs& args, int64_t batch) {
  core::check_array(op, argument, queue, t,
                    {{"B", batch}, {"H", args.heads_q}, {"S", args.samples}, {"N", args.seq_q}, {"D", args.dim}},
                    {DType::f32});
}

void check_gradient(const char* argument, const Queue& queue, const Tensor& gradient, const ConstTensor& like) {
  core::check_array(kBackward, argument, queue, gradient,
                    {{"B", like.shape[0]}, {"H", like.shape[1]}, {"N", like.shape[2]}, {"D", like.shape[3]}},
                    {DType::f32, DType::f16, DType::bf16});
}

SampledProposalsArgs check_backward(const Queue& queue, const ConstTensor& dw, const ConstTensor& score,
                                    const ConstTensor& q, const ConstTensor& k, const ConstTensor& indices,
                                    double scale, const Tensor& dq, const Tensor& dk) {
  SampledProposalsArgs args = check_inputs(kBackward, queue, q, k, indices);
  check_samples(kBackward, "dw", queue, dw, args, args.batch);
  if (score.defined()) {
    core::check_array(kBackward, "score", queue, score,
                      {{"B", args.batch}, {"H", args.heads_q}, {"S", args.samples}, {"N", args.seq_q}}, {DType::f32});
    args.score = without_samples(score, &args.sample_stride.score);
  }
  check_gradient("dq", queue, dq, q);
  check_gradient("dk", queue, dk, k);
  core::check_output(kBackward, "dq", dq, {&dw, &score, &q, &k, &indices, &dk});
  core::check_output(kBackward, "dk", dk, {&dw, &score, &q, &k, &indices, &dq});
  args.scale = core::check_scale(kBackward, "scale", scale, args.dim);
  args.dw = without_samples(dw, &args.sample_stride.dw);
  args.dq = core::operand(dq), args.dk = core::operand(dk);
  return args;
}

/// Reads the indices, so only where they are in the memory of the CPU.
void check_values(const char* op, const ConstTensor& indices, int64_t keys) {
  if (indices.device.type != DeviceType::cpu) return;
  const int64_t rows = indices.numel() == 0 ? 0 : indices.numel() / indices.shape[3];
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t s = row % indices.shape[2], h = row / indices.shape[2] % indices.shape[1];
    const int64_t b = row / indices.shape[2] / indices.shape[1];
    const auto* from = static_cast<const int32_t*>(indices.data) + b * indices.stride[0] + h * indices.stride[1] +
                       s * indices.stride[2];
    bool valid = true;
    for (int64_t n = 0; n < indices.shape[3]; ++n) valid &= from[n] >= -1 && from[n] < keys;
    for (int64_t n = 0; !valid && n < indices.shape[3]; ++n)
      if (from[n] < -1 || from[n] >= keys)
        core::invalid(op, "indices", "values in [-1, " + std::to_string(keys) + ")",
                      std::to_string(from[n]) + " at [" + std::to_string(b) + ", " + std::to_string(h) + ", " +
                          std::to_string(s) + ", " + std::to_string(n) + "]");
  }
}

bool empty(const SampledProposalsArgs& args) { return args.batch == 0 || args.heads_kv == 0; }

}  // namespace

void sampled_proposals(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor indices, ConstTensor noise,
                       double noise_std, Tensor w) {
  SampledProposalsArgs args = check_inputs(kForward, queue, q, k, indices);
  if (noise.defined()) {
    check_samples(kForward, "noise", queue, noise, args, noise.shape[0] == 1 ? 1 : args.batch);
    args.noise = without_samples(noise, &args.sample_stride.noise);
    if (noise.shape[0] == 1) args.noise.stride[0] = 0;
  }
  check_samples(kForward, "w", queue, w, args, args.batch);
  core::check_output(kForward, "w", w, {&q, &k, &indices, &noise});
  args.noise_std = float(noise_std);
  args.w = without_samples(w, &args.sample_stride.w);
  check_values(kForward, indices, args.seq_k);
  if (w.numel() > 0) core::launch(kForward, queue, &Kernels::sampled_proposals, args, Workspace());
}

void sampled_proposals_bwd(const Queue& queue, ConstTensor dw, ConstTensor score, ConstTensor q, ConstTensor k,
                           ConstTensor indices, double scale, Tensor dq, Tensor dk, Workspace workspace) {
  const SampledProposalsArgs args = check_backward(queue, dw, score, q, k, indices, scale, dq, dk);
  check_values(kBackward, indices, args.seq_k);
  if (!empty(args)) core::launch(kBackward, queue, &Kernels::sampled_proposals_bwd, args, workspace);
}

int64_t sampled_proposals_bwd_workspace_bytes(const Queue& queue, ConstTensor dw, ConstTensor score, ConstTensor q,
                                              ConstTensor k, ConstTensor indices, double scale, Tensor dq, Tensor dk) {
  const SampledProposalsArgs args = check_backward(queue, dw, score, q, k, indices, scale, dq, dk);
  return empty(args) ? 0 : core::workspace_bytes(kBackward, queue, &Kernels::sampled_proposals_bwd, args);
}

}  // namespace subquad
