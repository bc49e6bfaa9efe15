#include "subquad/running_mean.h"

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "running_mean";
const char* const kBackward = "running_mean_bwd";

void check_rows(const char* op, const char* argument, const Queue& queue, const ConstTensor& t, int64_t batch,
                int64_t heads, core::Axis tokens, int64_t dim) {
  core::check_array(op, argument, queue, t, {{"B", batch}, {"H", heads}, tokens, {"E", dim}},
                    {DType::f32, DType::f16, DType::bf16});
}

/// Checks v or dv, from which the other arrays take their shape, and the mask.
RunningMeanArgs check_keys(const char* op, const char* argument, const Queue& queue, const ConstTensor& v,
                           const ConstTensor& key_mask) {
  check_rows(op, argument, queue, v, kAny, kAny, {"M", kAny}, kAny);
  core::check_not_empty(op, argument, "E", v.shape[3]);
  RunningMeanArgs args = {};
  args.batch = v.shape[0], args.heads = v.shape[1], args.seq_k = v.shape[2], args.dim = v.shape[3];
  if (key_mask.defined())
    core::check_array(op, "key_mask", queue, key_mask, {{"B", args.batch}, {"M", args.seq_k}}, {DType::boolean});
  args.key_mask = core::operand(key_mask);
  return args;
}

void check_state(const char* op, const char* sum_name, const char* count_name, const Queue& queue,
                 const RunningMeanState& state, const RunningMeanArgs& args) {
  if (state.sum.defined())
    core::check_array(op, sum_name, queue, state.sum, {{"B", args.batch}, {"H", args.heads}, {"E", args.dim}},
                      {DType::f32});
  if (state.count.defined())
    core::check_array(op, count_name, queue, state.count, {{"B", args.batch}}, {DType::i32});
  else if (state.sum.defined())
    core::mismatch(op, count_name, "an array together with " + std::string(sum_name), "none");
}

void check_counts(const char* op, const Queue& queue, const RunningMeanArgs& args) {
  if (!args.count.data || queue.device.type != DeviceType::cpu) return;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t value = *element<int32_t>(args.count, b);
    if (value < 0)
      core::invalid(op, "state.count", "values of at least 0", std::to_string(value) + core::at_place({b}));
    if (value + args.seq_k > INT32_MAX)
      core::invalid(op, "state.count", "at most 2147483647 values in all",
                    std::to_string(value + args.seq_k) + core::at_place({b}));
  }
}

bool same_view(const ConstTensor& a, const ConstTensor& b) {
  bool same = a.data == b.data && a.dtype == b.dtype;
  for (int i = 0; i < a.rank; ++i) same &= a.shape[i] == b.shape[i] && (a.stride[i] == b.stride[i] || a.shape[i] == 1);
  return same;
}

/// A member of the state to write: memory of its own, or that of the same member of the state that came in.
void check_new(const char* argument, const Tensor& t, const Tensor& old, const Tensor& other_old, const Tensor& other,
               const ConstTensor& v, const ConstTensor& key_mask, const Tensor& out) {
  const ConstTensor none;
  core::check_output(kForward, argument, t,
                     {&v, &key_mask, &out, &other, &other_old, same_view(t, old) ? &none : &old});
}

RunningMeanArgs check_forward(const Queue& queue, const ConstTensor& v, const ConstTensor& key_mask,
                              const RunningMeanState& state, const Tensor& out, const RunningMeanState& new_state) {
  RunningMeanArgs args = check_keys(kForward, "v", queue, v, key_mask);
  check_state(kForward, "state.sum", "state.count", queue, state, args);
  if (state.count.defined() && !state.sum.defined())
    core::mismatch(kForward, "state.sum", "an array together with state.count", "none");
  check_rows(kForward, "out", queue, out, args.batch, args.heads, {"N", kAny}, args.dim);
  args.seq_q = out.shape[2];
  core::check_output(kForward, "out", out, {&v, &key_mask, &state.sum, &state.count, &new_state.sum, &new_state.count});
  check_state(kForward, "new_state.sum", "new_state.count", queue, new_state, args);
  check_new("new_state.sum", new_state.sum, state.sum, state.count, new_state.count, v, key_mask, out);
  check_new("new_state.count", new_state.count, state.count, state.sum, new_state.sum, v, key_mask, out);
  args.v = core::operand(v), args.out = core::operand(out);
  args.sum = core::operand(state.sum), args.count = core::operand(state.count);
  args.new_sum = core::operand(new_state.sum), args.new_count = core::operand(new_state.count);
  return args;
}

RunningMeanArgs check_backward(const Queue& queue, const ConstTensor& dout, const ConstTensor& base,
                               const ConstTensor& key_mask, const RunningMeanState& state, const Tensor& dv) {
  RunningMeanArgs args = check_keys(kBackward, "dv", queue, dv, key_mask);
  check_state(kBackward, "state.sum", "state.count", queue, state, args);
  check_rows(kBackward, "dout", queue, dout, args.batch, args.heads, {"N", kAny}, args.dim);
  args.seq_q = dout.shape[2];
  if (base.defined()) check_rows(kBackward, "base", queue, base, args.batch, args.heads, {"M", args.seq_k}, args.dim);
  core::check_output(kBackward, "dv", dv, {&dout, &base, &key_mask, &state.sum, &state.count});
  args.count = core::operand(state.count);
  args.dout = core::operand(dout), args.base = core::operand(base), args.dv = core::operand(dv);
  return args;
}

}  // namespace

void running_mean(const Queue& queue, ConstTensor v, ConstTensor key_mask, const RunningMeanState& state, Tensor out,
                  const RunningMeanState& new_state, Workspace workspace) {
  const RunningMeanArgs args = check_forward(queue, v, key_mask, state, out, new_state);
  check_counts(kForward, queue, args);
  if (args.batch > 0) core::launch(kForward, queue, &Kernels::running_mean, args, workspace);
}

int64_t running_mean_workspace_bytes(const Queue& queue, ConstTensor v, ConstTensor key_mask,
                                     const RunningMeanState& state, Tensor out, const RunningMeanState& new_state) {
  const RunningMeanArgs args = check_forward(queue, v, key_mask, state, out, new_state);
  return args.batch > 0 ? core::workspace_bytes(kForward, queue, &Kernels::running_mean, args) : 0;
}

void running_mean_bwd(const Queue& queue, ConstTensor dout, ConstTensor base, ConstTensor key_mask,
                      const RunningMeanState& state, Tensor dv, Workspace workspace) {
  const RunningMeanArgs args = check_backward(queue, dout, base, key_mask, state, dv);
  check_counts(kBackward, queue, args);
  if (dv.numel() > 0) core::launch(kBackward, queue, &Kernels::running_mean_bwd, args, workspace);
}

int64_t running_mean_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor base, ConstTensor key_mask,
                                         const RunningMeanState& state, Tensor dv) {
  const RunningMeanArgs args = check_backward(queue, dout, base, key_mask, state, dv);
  return dv.numel() > 0 ? core::workspace_bytes(kBackward, queue, &Kernels::running_mean_bwd, args) : 0;
}

}  // namespace subquad
