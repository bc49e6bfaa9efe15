#include "subquad/linear_attention.h"

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "linear_attention";
const char* const kBackward = "linear_attention_bwd";
constexpr int64_t kMaxFeatures = 8192;

bool has_shift(const LinearAttentionOptions& options) {
  return options.log_features || options.key_log_weight.defined();
}

/// Checks one optional number per key, which may be a view with a stride of 0.
void check_keys(const char* op, const char* argument, const Queue& queue, ConstTensor t,
                const LinearAttentionArgs& args) {
  if (!t.defined()) return;
  if (t.rank == 3 && t.stride[2] == 0) t.stride[2] = 1;
  core::check_array(op, argument, queue, t, {{"B", args.batch}, {"Hkv", args.heads_kv}, {"M", args.seq_k}},
                    {DType::f32});
}

void check_options(const char* op, const Queue& queue, const LinearAttentionOptions& options,
                   const LinearAttentionArgs& args) {
  const auto rule = [&](bool holds, const char* argument, const char* expected, const char* got) {
    if (!holds) core::invalid(op, argument, expected, got);
  };
  rule(!(options.log_features && options.key_log_weight.defined()), "key_log_weight", "none with log_features",
       "an array");
  rule(options.normalize || !has_shift(options), "normalize", "true with log_features or key_log_weight", "false");
  rule(!(options.gate.defined() && options.decay.defined()), "decay", "a gate or a decay, not both", "both");
  rule(options.is_causal || !options.gate.defined(), "gate", "none unless is_causal", "an array");
  rule(options.is_causal || !options.decay.defined(), "decay", "none unless is_causal", "an array");
  check_keys(op, "key_log_weight", queue, options.key_log_weight, args);
  check_keys(op, "gate", queue, options.gate, args);
  check_keys(op, "decay", queue, options.decay, args);
  if (options.key_mask.defined())
    core::check_array(op, "key_mask", queue, options.key_mask, {{"B", args.batch}, {"M", args.seq_k}},
                      {DType::boolean});
}

/// Checks a state; returns whether it is given.
bool check_state(const char* op, const char* argument, const Queue& queue, const LinearAttentionState& state,
                 const LinearAttentionOptions& options, const LinearAttentionArgs& args) {
  const std::string name = argument;
  const bool any = state.s.defined() || state.z.defined() || state.shift.defined();
  if (!any) return false;
  if (!options.is_causal) core::invalid(op, argument, "none unless is_causal", "a state");
  const int64_t b = args.batch, h = args.heads_kv, f = args.dim_features;
  core::check_array(op, (name + ".s").c_str(), queue, state.s, {{"B", b}, {"Hkv", h}, {"F", f}, {"E", args.dim_v}},
                    {DType::f32});
  core::check_array(op, (name + ".z").c_str(), queue, state.z, {{"B", b}, {"Hkv", h}, {"F", f}}, {DType::f32});
  const std::string shift = name + ".shift";
  if (has_shift(options))
    core::check_array(op, shift.c_str(), queue, state.shift, {{"B", b}, {"Hkv", h}, {"F", f}}, {DType::f32});
  else if (state.shift.defined())
    core::invalid(op, shift.c_str(), "none without log_features and key_log_weight", "an array");
  return true;
}

/// What both passes share: fq, fk, v, the options, the state in, and the fields of Args that they give.
LinearAttentionArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& fq, const ConstTensor& fk,
                                 const ConstTensor& v, const LinearAttentionOptions& options,
                                 const LinearAttentionState& state) {
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(op, "fq", queue, fq, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"F", kAny}}, floats);
  core::check_range(op, "fq", fq.shape[3], 1, kMaxFeatures);
  core::check_array(op, "fk", queue, fk, {{"B", fq.shape[0]}, {"Hkv", kAny}, {"M", kAny}, {"F", fq.shape[3]}}, floats);
  core::check_groups(op, "fk", fq.shape[1], fk.shape[1]);
  core::check_array(op, "v", queue, v, {{"B", fq.shape[0]}, {"Hkv", fk.shape[1]}, {"M", fk.shape[2]}, {"E", kAny}},
                    floats);
  core::check_range(op, "v", v.shape[3], 1, kMaxHeadDim);

  LinearAttentionArgs args = {};
  args.batch = fq.shape[0], args.heads_q = fq.shape[1], args.heads_kv = fk.shape[1];
  args.seq_q = fq.shape[2], args.seq_k = fk.shape[2], args.dim_features = fq.shape[3], args.dim_v = v.shape[3];
  args.log_features = options.log_features, args.causal = options.is_causal, args.normalize = options.normalize;
  args.gated = options.gate.defined(), args.weighted = options.key_log_weight.defined();
  check_options(op, queue, options, args);
  check_state(op, "state", queue, state, options, args);
  args.fq = core::operand(fq), args.fk = core::operand(fk), args.v = core::operand(v);
  args.key_log_weight = core::operand(options.key_log_weight), args.key_mask = core::operand(options.key_mask);
  args.decay = core::operand(options.gate.defined() ? options.gate : options.decay);
  args.s = core::operand(state.s), args.z = core::operand(state.z), args.shift = core::operand(state.shift);
  return args;
}

bool same_view(const ConstTensor& a, const ConstTensor& b) {
  bool same = a.data == b.data && a.defined() && b.defined();
  for (int i = 0; i < a.rank; ++i) same &= a.stride[i] == b.stride[i] || a.shape[i] == 1;
  return same;
}

/// Checks that an output overlaps no input, no state but the member `own`, and none of `outputs`.
void check_result(const char* op, const char* argument, const Tensor& result, const ConstTensor& own,
                  std::initializer_list<const ConstTensor*> inputs, std::initializer_list<const ConstTensor*> outputs) {
  const bool in_place = same_view(result, own);
  for (const ConstTensor* input : inputs)
    if (!(in_place && same_view(*input, own))) core::check_output(op, argument, result, {input});
  for (const ConstTensor* output : outputs)
    if (output != &result) core::check_output(op, argument, result, {output});
}

LinearAttentionArgs check_forward(const Queue& queue, const ConstTensor& fq, const ConstTensor& fk,
                                  const ConstTensor& v, const LinearAttentionOptions& options,
                                  const LinearAttentionState& state, const Tensor& out,
                                  const LinearAttentionState& next) {
  LinearAttentionArgs args = check_inputs(kForward, queue, fq, fk, v, options, state);
  core::check_array(kForward, "out", queue, out,
                    {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}, {"E", args.dim_v}},
                    {DType::f32, DType::f16, DType::bf16});
  check_state(kForward, "new_state", queue, next, options, args);
  const LinearAttentionOptions& o = options;
  const std::initializer_list<const ConstTensor*> inputs = {
      &fq, &fk, &v, &o.key_log_weight, &o.key_mask, &o.gate, &o.decay, &state.s, &state.z, &state.shift};
  const std::initializer_list<const ConstTensor*> outputs = {&out, &next.s, &next.z, &next.shift};
  check_result(kForward, "out", out, ConstTensor(), inputs, outputs);
  check_result(kForward, "new_state.s", next.s, state.s, inputs, outputs);
  check_result(kForward, "new_state.z", next.z, state.z, inputs, outputs);
  check_result(kForward, "new_state.shift", next.shift, state.shift, inputs, outputs);
  args.out = core::operand(out);
  args.new_s = core::operand(next.s), args.new_z = core::operand(next.z), args.new_shift = core::operand(next.shift);
  return args;
}

void check_gradient(const char* argument, const Queue& queue, const Tensor& gradient, const ConstTensor& like) {
  core::check_array(kBackward, argument, queue, gradient,
                    {{"B", like.shape[0]}, {"H", like.shape[1]}, {"N", like.shape[2]}, {"F", like.shape[3]}},
                    {DType::f32, DType::f16, DType::bf16});
}

/// Checks an optional gradient of one number per key.
void check_key_gradient(const char* argument, const Queue& queue, const Tensor& gradient, bool has_input,
                        const char* rule, const LinearAttentionArgs& args) {
  if (!gradient.defined()) return;
  if (!has_input) core::invalid(kBackward, argument, rule, "an array");
  core::check_array(kBackward, argument, queue, gradient,
                    {{"B", args.batch}, {"Hkv", args.heads_kv}, {"M", args.seq_k}}, {DType::f32});
}

LinearAttentionArgs check_backward(const Queue& queue, const ConstTensor& dout, const ConstTensor& fq,
                                   const ConstTensor& fk, const ConstTensor& v, const LinearAttentionOptions& options,
                                   const LinearAttentionState& state, const LinearAttentionGradients& to) {
  LinearAttentionArgs args = check_inputs(kBackward, queue, fq, fk, v, options, state);
  core::check_array(kBackward, "dout", queue, dout,
                    {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}, {"E", args.dim_v}},
                    {DType::f32, DType::f16, DType::bf16});
  check_gradient("dfq", queue, to.dfq, fq);
  check_gradient("dfk", queue, to.dfk, fk);
  check_gradient("dv", queue, to.dv, v);
  const LinearAttentionOptions& o = options;
  check_key_gradient("dkey_log_weight", queue, to.dkey_log_weight, o.key_log_weight.defined(),
                     "none without key_log_weight", args);
  check_key_gradient("dgate", queue, to.dgate, o.gate.defined() || o.decay.defined(), "none without gate and decay",
                     args);
  const std::initializer_list<const ConstTensor*> inputs = {
      &dout, &fq, &fk, &v, &o.key_log_weight, &o.key_mask, &o.gate, &o.decay, &state.s, &state.z, &state.shift};
  const std::initializer_list<const ConstTensor*> outputs = {&to.dfq, &to.dfk, &to.dv, &to.dkey_log_weight, &to.dgate};
  check_result(kBackward, "dfq", to.dfq, ConstTensor(), inputs, outputs);
  check_result(kBackward, "dfk", to.dfk, ConstTensor(), inputs, outputs);
  check_result(kBackward, "dv", to.dv, ConstTensor(), inputs, outputs);
  check_result(kBackward, "dkey_log_weight", to.dkey_log_weight, ConstTensor(), inputs, outputs);
  check_result(kBackward, "dgate", to.dgate, ConstTensor(), inputs, outputs);
  args.dout = core::operand(dout);
  args.dfq = core::operand(to.dfq), args.dfk = core::operand(to.dfk), args.dv = core::operand(to.dv);
  args.dkey_log_weight = core::operand(to.dkey_log_weight), args.ddecay = core::operand(to.dgate);
  return args;
}

/// Checks that all elements lie in [0, 1]; reads them, so only on the CPU and only before a run.
/// Reads the gates or decays of the keys that are not masked.
void check_fractions(const char* op, const char* argument, const ConstTensor& t, const ConstTensor& mask) {
  if (!t.defined() || t.device.type != DeviceType::cpu || t.numel() == 0) return;
  for (int64_t b = 0; b < t.shape[0]; ++b)
    for (int64_t h = 0; h < t.shape[1]; ++h)
      for (int64_t m = 0; m < (t.stride[2] == 0 ? 1 : t.shape[2]); ++m) {
        const int64_t at = b * t.stride[0] + h * t.stride[1] + m * t.stride[2];
        const float x = static_cast<const float*>(t.data)[at];
        const bool masked = mask.defined() && t.stride[2] != 0 &&
                            !static_cast<const bool*>(mask.data)[b * mask.stride[0] + m * mask.stride[1]];
        if (masked || (x >= 0 && x <= 1)) continue;
        core::invalid(op, argument, "values in [0, 1]",
                      std::to_string(x) + " at [" + std::to_string(b) + ", " + std::to_string(h) + ", " +
                          std::to_string(m) + "]");
      }
}

}  // namespace

void linear_attention(const Queue& queue, ConstTensor fq, ConstTensor fk, ConstTensor v,
                      const LinearAttentionOptions& options, const LinearAttentionState& state, Tensor out,
                      const LinearAttentionState& new_state, Workspace workspace) {
  const LinearAttentionArgs args = check_forward(queue, fq, fk, v, options, state, out, new_state);
  check_fractions(kForward, "gate", options.gate, options.key_mask);
  check_fractions(kForward, "decay", options.decay, options.key_mask);
  core::launch(kForward, queue, &Kernels::linear_attention, args, workspace);
}

int64_t linear_attention_workspace_bytes(const Queue& queue, ConstTensor fq, ConstTensor fk, ConstTensor v,
                                         const LinearAttentionOptions& options, const LinearAttentionState& state,
                                         Tensor out, const LinearAttentionState& new_state) {
  return core::workspace_bytes(kForward, queue, &Kernels::linear_attention,
                               check_forward(queue, fq, fk, v, options, state, out, new_state));
}

void linear_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor fq, ConstTensor fk, ConstTensor v,
                          const LinearAttentionOptions& options, const LinearAttentionState& state,
                          const LinearAttentionGradients& gradients, Workspace workspace) {
  const LinearAttentionArgs args = check_backward(queue, dout, fq, fk, v, options, state, gradients);
  check_fractions(kBackward, "gate", options.gate, options.key_mask);
  check_fractions(kBackward, "decay", options.decay, options.key_mask);
  core::launch(kBackward, queue, &Kernels::linear_attention_bwd, args, workspace);
}

int64_t linear_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor fq, ConstTensor fk,
                                             ConstTensor v, const LinearAttentionOptions& options,
                                             const LinearAttentionState& state,
                                             const LinearAttentionGradients& gradients) {
  return core::workspace_bytes(kBackward, queue, &Kernels::linear_attention_bwd,
                               check_backward(queue, dout, fq, fk, v, options, state, gradients));
}

}  // namespace subquad
