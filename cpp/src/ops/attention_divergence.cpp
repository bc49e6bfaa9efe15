#include "subquad/attention_divergence.h"

#include "core/registry.h"
#include "ops/visible_check.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "attention_divergence";
const char* const kBackward = "attention_divergence_bwd";

/// What both passes share.
AttentionDivergenceArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& q, const ConstTensor& k,
                                     const ConstTensor& q_teacher, const ConstTensor& k_teacher,
                                     const AttentionDivergenceOptions& options) {
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(op, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
  core::check_not_empty(op, "q", "D", q.shape[3]);
  const int64_t batch = q.shape[0], heads = q.shape[1], seq_q = q.shape[2];
  core::check_array(op, "k", queue, k, {{"B", batch}, {"Hkv", kAny}, {"M", kAny}, {"D", q.shape[3]}}, {q.dtype});
  core::check_groups(op, "k", heads, k.shape[1]);
  core::check_array(op, "q_teacher", queue, q_teacher, {{"B", batch}, {"H", heads}, {"N", seq_q}, {"Dt", kAny}},
                    floats);
  core::check_not_empty(op, "q_teacher", "Dt", q_teacher.shape[3]);
  core::check_array(op, "k_teacher", queue, k_teacher,
                    {{"B", batch}, {"Ht", kAny}, {"M", k.shape[2]}, {"Dt", q_teacher.shape[3]}}, {q_teacher.dtype});
  core::check_groups(op, "k_teacher", heads, k_teacher.shape[1]);
  ops::check_visible(op, queue, options.visible, options.positions, batch, seq_q, k.shape[2]);

  AttentionDivergenceArgs args = {};
  args.batch = batch, args.heads_q = heads, args.heads_kv = k.shape[1], args.heads_teacher = k_teacher.shape[1];
  args.seq_q = seq_q, args.seq_k = k.shape[2], args.dim = q.shape[3], args.dim_teacher = q_teacher.shape[3];
  args.scale = core::check_scale(op, "scale", options.scale, args.dim);
  args.scale_teacher = core::check_scale(op, "scale_teacher", options.scale_teacher, args.dim_teacher);
  args.q = core::operand(q), args.k = core::operand(k);
  args.q_teacher = core::operand(q_teacher), args.k_teacher = core::operand(k_teacher);
  args.visible = core::operand(options.visible), args.positions = core::operand(options.positions);
  return args;
}

void check_rows(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                const AttentionDivergenceArgs& args) {
  core::check_array(op, argument, queue, t, {{"B", args.batch}, {"H", args.heads_q}, {"N", args.seq_q}}, {DType::f32});
}

AttentionDivergenceArgs check_forward(const Queue& queue, const ConstTensor& q, const ConstTensor& k,
                                      const ConstTensor& q_teacher, const ConstTensor& k_teacher,
                                      const AttentionDivergenceOptions& options, const Tensor& kl, const Tensor& sse) {
  AttentionDivergenceArgs args = check_inputs(kForward, queue, q, k, q_teacher, k_teacher, options);
  check_rows(kForward, "kl", queue, kl, args);
  check_rows(kForward, "sse", queue, sse, args);
  const ConstTensor &visible = options.visible, &positions = options.positions;
  core::check_output(kForward, "kl", kl, {&q, &k, &q_teacher, &k_teacher, &visible, &positions, &sse});
  core::check_output(kForward, "sse", sse, {&q, &k, &q_teacher, &k_teacher, &visible, &positions, &kl});
  args.kl = core::operand(kl), args.sse = core::operand(sse);
  return args;
}

void check_gradient(const char* argument, const Queue& queue, const Tensor& gradient, const ConstTensor& like) {
  core::check_array(kBackward, argument, queue, gradient,
                    {{"B", like.shape[0]}, {"H", like.shape[1]}, {"N", like.shape[2]}, {"D", like.shape[3]}},
                    {like.dtype});
}

AttentionDivergenceArgs check_backward(const Queue& queue, const ConstTensor& dkl, const ConstTensor& dsse,
                                       const ConstTensor& q, const ConstTensor& k, const ConstTensor& q_teacher,
                                       const ConstTensor& k_teacher, const AttentionDivergenceOptions& options,
                                       const Tensor& dq, const Tensor& dk) {
  AttentionDivergenceArgs args = check_inputs(kBackward, queue, q, k, q_teacher, k_teacher, options);
  if (dkl.defined()) check_rows(kBackward, "dkl", queue, dkl, args);
  if (dsse.defined()) check_rows(kBackward, "dsse", queue, dsse, args);
  check_gradient("dq", queue, dq, q);
  check_gradient("dk", queue, dk, k);
  const ConstTensor &visible = options.visible, &positions = options.positions;
  core::check_output(kBackward, "dq", dq, {&dkl, &dsse, &q, &k, &q_teacher, &k_teacher, &visible, &positions, &dk});
  core::check_output(kBackward, "dk", dk, {&dkl, &dsse, &q, &k, &q_teacher, &k_teacher, &visible, &positions, &dq});
  args.dkl = core::operand(dkl), args.dsse = core::operand(dsse);
  args.dq = core::operand(dq), args.dk = core::operand(dk);
  return args;
}

}  // namespace

void attention_divergence(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor q_teacher,
                          ConstTensor k_teacher, const AttentionDivergenceOptions& options, Tensor kl, Tensor sse,
                          Workspace workspace) {
  const AttentionDivergenceArgs args = check_forward(queue, q, k, q_teacher, k_teacher, options, kl, sse);
  ops::check_visible_values(kForward, queue, args.visible, args.positions, args.batch, args.seq_q, args.seq_k);
  core::launch(kForward, queue, &Kernels::attention_divergence, args, workspace);
}

int64_t attention_divergence_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor q_teacher,
                                             ConstTensor k_teacher, const AttentionDivergenceOptions& options,
                                             Tensor kl, Tensor sse) {
  return core::workspace_bytes(kForward, queue, &Kernels::attention_divergence,
                               check_forward(queue, q, k, q_teacher, k_teacher, options, kl, sse));
}

void attention_divergence_bwd(const Queue& queue, ConstTensor dkl, ConstTensor dsse, ConstTensor q, ConstTensor k,
                              ConstTensor q_teacher, ConstTensor k_teacher, const AttentionDivergenceOptions& options,
                              Tensor dq, Tensor dk, Workspace workspace) {
  const AttentionDivergenceArgs args = check_backward(queue, dkl, dsse, q, k, q_teacher, k_teacher, options, dq, dk);
  ops::check_visible_values(kBackward, queue, args.visible, args.positions, args.batch, args.seq_q, args.seq_k);
  core::launch(kBackward, queue, &Kernels::attention_divergence_bwd, args, workspace);
}

int64_t attention_divergence_bwd_workspace_bytes(const Queue& queue, ConstTensor dkl, ConstTensor dsse, ConstTensor q,
                                                 ConstTensor k, ConstTensor q_teacher, ConstTensor k_teacher,
                                                 const AttentionDivergenceOptions& options, Tensor dq, Tensor dk) {
  return core::workspace_bytes(kBackward, queue, &Kernels::attention_divergence_bwd,
                               check_backward(queue, dkl, dsse, q, k, q_teacher, k_teacher, options, dq, dk));
}

}  // namespace subquad
