#include "subquad/mixture_weights.h"

#include <cmath>

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "mixture_weights";
const char* const kBackward = "mixture_weights_bwd";

void check_options(const char* op, const Queue& queue, const MixtureWeightsOptions& o, const MixtureWeightsArgs& args) {
  if (o.scale != 0 && !(float(o.scale) > 0 && std::isfinite(float(o.scale))))
    core::invalid(op, "scale", "a finite value above 0, or 0 for D^-1/2", std::to_string(o.scale));
  if (!std::isfinite(float(o.alpha_coeff)))
    core::invalid(op, "alpha_coeff", "a finite float32", std::to_string(o.alpha_coeff));
  if (o.query_mask.defined())
    core::check_array(op, "query_mask", queue, o.query_mask, {{"B", args.batch}, {"N", args.seq}}, {DType::boolean});
  if (o.counts.defined())
    core::check_array(op, "counts", queue, o.counts, {{"B", args.batch}, {"C", args.landmarks}}, {DType::i32});
}

/// What both passes share.
MixtureWeightsArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& q, const ConstTensor& q_bar,
                                const ConstTensor& column_lse, const ConstTensor& balance,
                                const MixtureWeightsOptions& options) {
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  MixtureWeightsArgs args = {};
  core::check_array(op, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
  args.batch = q.shape[0], args.heads = q.shape[1], args.seq = q.shape[2], args.dim = q.shape[3];
  if (args.dim == 0) core::invalid(op, "q", "D of at least 1", "0");
  core::check_array(op, "q_bar", queue, q_bar, {{"B", args.batch}, {"H", args.heads}, {"C", kAny}, {"D", args.dim}},
                    floats);
  args.landmarks = q_bar.shape[2];
  if (options.over_queries)
    core::check_array(op, "column_lse", queue, column_lse,
                      {{"B", args.batch}, {"H", args.heads}, {"C", args.landmarks}}, {DType::f32});
  else if (column_lse.defined())
    core::invalid(op, "column_lse", "none unless over_queries", "an array");
  core::check_array(op, "balance", queue, balance, {{"B", args.batch}, {"H", args.heads}, {"J", kAny}}, {DType::f32});
  args.samples = balance.shape[2];
  if (args.landmarks == 0 ? args.samples != 0 : args.samples % args.landmarks != 0)
    core::invalid(op, "balance", "J a multiple of C = " + std::to_string(args.landmarks), std::to_string(args.samples));
  check_options(op, queue, options, args);

  args.scale = options.scale == 0 ? float(1 / std::sqrt(double(args.dim))) : float(options.scale);
  args.alpha_coeff = float(options.alpha_coeff), args.over_queries = options.over_queries;
  args.q = core::operand(q), args.q_bar = core::operand(q_bar);
  args.column_lse = core::operand(column_lse), args.balance = core::operand(balance);
  args.query_mask = core::operand(options.query_mask), args.counts = core::operand(options.counts);
  return args;
}

void check_weights(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                   const MixtureWeightsArgs& a) {
  core::check_array(op, argument, queue, t, {{"B", a.batch}, {"H", a.heads}, {"N", a.seq}, {"J", a.samples}},
                    {DType::f32});
}

MixtureWeightsArgs check_forward(const Queue& queue, const ConstTensor& q, const ConstTensor& q_bar,
                                 const ConstTensor& column_lse, const ConstTensor& balance,
                                 const MixtureWeightsOptions& options, const Tensor& log_alpha) {
  MixtureWeightsArgs args = check_inputs(kForward, queue, q, q_bar, column_lse, balance, options);
  check_weights(kForward, "log_alpha", queue, log_alpha, args);
  core::check_output(kForward, "log_alpha", log_alpha,
                     {&q, &q_bar, &column_lse, &balance, &options.query_mask, &options.counts});
  args.log_alpha = core::operand(log_alpha);
  return args;
}

MixtureWeightsArgs check_backward(const Queue& queue, const ConstTensor& dlog_alpha, const ConstTensor& q,
                                  const ConstTensor& q_bar, const ConstTensor& column_lse, const ConstTensor& balance,
                                  const MixtureWeightsOptions& options, const Tensor& dq, const Tensor& dq_bar,
                                  const Tensor& dbalance) {
  MixtureWeightsArgs args = check_inputs(kBackward, queue, q, q_bar, column_lse, balance, options);
  check_weights(kBackward, "dlog_alpha", queue, dlog_alpha, args);
  core::check_array(kBackward, "dq", queue, dq,
                    {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}, {"D", args.dim}},
                    {DType::f32, DType::f16, DType::bf16});
  core::check_array(kBackward, "dq_bar", queue, dq_bar,
                    {{"B", args.batch}, {"H", args.heads}, {"C", args.landmarks}, {"D", args.dim}}, {DType::f32});
  core::check_array(kBackward, "dbalance", queue, dbalance, {{"B", args.batch}, {"H", args.heads}, {"J", args.samples}},
                    {DType::f32});
  const ConstTensor &mask = options.query_mask, &counts = options.counts;
  core::check_output(kBackward, "dq", dq,
                     {&dlog_alpha, &q, &q_bar, &column_lse, &balance, &mask, &counts, &dq_bar, &dbalance});
  core::check_output(kBackward, "dq_bar", dq_bar,
                     {&dlog_alpha, &q, &q_bar, &column_lse, &balance, &mask, &counts, &dbalance});
  core::check_output(kBackward, "dbalance", dbalance, {&dlog_alpha, &q, &q_bar, &column_lse, &balance, &mask, &counts});
  args.dlog_alpha = core::operand(dlog_alpha);
  args.dq = core::operand(dq), args.dq_bar = core::operand(dq_bar), args.dbalance = core::operand(dbalance);
  return args;
}

}  // namespace

void mixture_weights(const Queue& queue, ConstTensor q, ConstTensor q_bar, ConstTensor column_lse, ConstTensor balance,
                     const MixtureWeightsOptions& options, Tensor log_alpha, Workspace workspace) {
  const MixtureWeightsArgs args = check_forward(queue, q, q_bar, column_lse, balance, options, log_alpha);
  core::launch(kForward, queue, &Kernels::mixture_weights, args, workspace);
}

int64_t mixture_weights_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor q_bar, ConstTensor column_lse,
                                        ConstTensor balance, const MixtureWeightsOptions& options, Tensor log_alpha) {
  return core::workspace_bytes(kForward, queue, &Kernels::mixture_weights,
                               check_forward(queue, q, q_bar, column_lse, balance, options, log_alpha));
}

void mixture_weights_bwd(const Queue& queue, ConstTensor dlog_alpha, ConstTensor q, ConstTensor q_bar,
                         ConstTensor column_lse, ConstTensor balance, const MixtureWeightsOptions& options, Tensor dq,
                         Tensor dq_bar, Tensor dbalance, Workspace workspace) {
  const MixtureWeightsArgs args =
      check_backward(queue, dlog_alpha, q, q_bar, column_lse, balance, options, dq, dq_bar, dbalance);
  core::launch(kBackward, queue, &Kernels::mixture_weights_bwd, args, workspace);
}

int64_t mixture_weights_bwd_workspace_bytes(const Queue& queue, ConstTensor dlog_alpha, ConstTensor q,
                                            ConstTensor q_bar, ConstTensor column_lse, ConstTensor balance,
                                            const MixtureWeightsOptions& options, Tensor dq, Tensor dq_bar,
                                            Tensor dbalance) {
  return core::workspace_bytes(
      kBackward, queue, &Kernels::mixture_weights_bwd,
      check_backward(queue, dlog_alpha, q, q_bar, column_lse, balance, options, dq, dq_bar, dbalance));
}

}  // namespace subquad
