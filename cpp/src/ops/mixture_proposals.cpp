#include "subquad/mixture_proposals.h"

#include <cmath>

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kForward = "mixture_proposals";
const char* const kBackward = "mixture_proposals_bwd";

void check_options(const char* op, const MixtureProposalsOptions& o) {
  if (o.scale != 0 && !(float(o.scale) > 0 && std::isfinite(float(o.scale))))
    core::invalid(op, "scale", "a finite value above 0, or 0 for D^-1/2", std::to_string(o.scale));
  if (!std::isfinite(float(o.noise_std)))
    core::invalid(op, "noise_std", "a finite float32", std::to_string(o.noise_std));
  if (o.mis != Mis::opt && o.mis != Mis::bh && o.mis != Mis::biased)
    core::invalid(op, "mis", "opt, bh or biased", std::to_string(int(o.mis)));
}

/// What both passes share; the number of samples is `samples`, or follows from the noise where that is kAny.
MixtureProposalsArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& q_bar,
                                  const ConstTensor& k_bar, const ConstTensor& noise,
                                  const MixtureProposalsOptions& options, int64_t samples) {
  const auto floats = {DType::f32, DType::f16, DType::bf16};
  core::check_array(op, "q_bar", queue, q_bar, {{"B", kAny}, {"H", kAny}, {"C", kAny}, {"D", kAny}}, floats);
  const int64_t batch = q_bar.shape[0], heads = q_bar.shape[1], landmarks = q_bar.shape[2], dim = q_bar.shape[3];
  if (dim == 0) core::invalid(op, "q_bar", "D of at least 1", "0");
  core::check_array(op, "k_bar", queue, k_bar, {{"B", batch}, {"Hkv", kAny}, {"C", landmarks}, {"D", dim}}, floats);
  core::check_groups(op, "k_bar", heads, k_bar.shape[1]);
  check_options(op, options);
  const bool halved = options.antithetic && noise.defined();
  if (noise.defined()) {
    const bool shared = noise.rank == 4 && noise.shape[0] == 1;
    core::check_array(op, "noise", queue, noise, {{"B", shared ? 1 : batch}, {"H", heads}, {"J", kAny}, {"D", dim}},
                      {DType::f32});
    if (samples == kAny) samples = noise.shape[2] * (halved ? 2 : 1);
    if (noise.shape[2] * (halved ? 2 : 1) != samples)
      core::invalid(op, "noise", std::string(halved ? "J / 2" : "J") + " rows for J = " + std::to_string(samples),
                    std::to_string(noise.shape[2]));
  } else if (samples == kAny) {
    samples = landmarks;
  }
  const bool fits = landmarks == 0 ? samples == 0 : noise.defined() ? samples % landmarks == 0 : samples == landmarks;
  if (!fits)
    core::invalid(
        op, noise.defined() ? "noise" : "w",
        std::string(noise.defined() ? "J a multiple of C" : "without noise J = C") + " = " + std::to_string(landmarks),
        std::to_string(samples));
  if (options.counts.defined())
    core::check_array(op, "counts", queue, options.counts, {{"B", batch}, {"C", landmarks}}, {DType::i32});

  MixtureProposalsArgs args = {};
  args.batch = batch, args.heads_q = heads, args.heads_kv = k_bar.shape[1];
  args.landmarks = landmarks, args.samples = samples, args.dim = dim;
  args.scale = options.scale == 0 ? float(1 / std::sqrt(double(dim))) : float(options.scale);
  args.noise_std = float(options.noise_std);
  args.antithetic = halved, args.mis = options.mis;
  args.q_bar = core::operand(q_bar), args.k_bar = core::operand(k_bar), args.noise = core::operand(noise);
  if (noise.defined() && noise.shape[0] == 1) args.noise.stride[0] = 0;
  args.counts = core::operand(options.counts);
  return args;
}

/// Checks an array [B, H, J, D] or, with `rank` 3, [B, H, J].
void check_samples(const char* op, const char* argument, const Queue& queue, const ConstTensor& t, int rank,
                   const MixtureProposalsArgs& a) {
  if (rank == 4)
    core::check_array(op, argument, queue, t, {{"B", a.batch}, {"H", a.heads_q}, {"J", a.samples}, {"D", a.dim}},
                      {DType::f32});
  else
    core::check_array(op, argument, queue, t, {{"B", a.batch}, {"H", a.heads_q}, {"J", a.samples}}, {DType::f32});
}

/// Checks an array that exists under one rule only.
void check_under(const char* op, const char* argument, const Queue& queue, const ConstTensor& t, int rank,
                 const MixtureProposalsArgs& a, Mis mis, bool needed) {
  if (a.mis != mis && t.defined())
    core::invalid(op, argument, std::string("none unless mis is ") + (mis == Mis::opt ? "opt" : "biased"), "an array");
  if (a.mis == mis && (needed || t.defined())) check_samples(op, argument, queue, t, rank, a);
}

MixtureProposalsArgs check_forward(const Queue& queue, const ConstTensor& q_bar, const ConstTensor& k_bar,
                                   const ConstTensor& noise, const MixtureProposalsOptions& options,
                                   const MixtureProposals& r) {
  core::check_array(kForward, "w", queue, r.w, {{"B", kAny}, {"H", kAny}, {"J", kAny}, {"D", kAny}}, {DType::f32});
  MixtureProposalsArgs args = check_inputs(kForward, queue, q_bar, k_bar, noise, options, r.w.shape[2]);
  check_samples(kForward, "w", queue, r.w, 4, args);
  check_under(kForward, "keys", queue, r.keys, 4, args, Mis::biased, true);
  check_samples(kForward, "log_density", queue, r.log_density, 3, args);
  check_under(kForward, "balance", queue, r.balance, 3, args, Mis::opt, true);
  const ConstTensor& counts = options.counts;
  core::check_output(kForward, "w", r.w, {&q_bar, &k_bar, &noise, &counts, &r.keys, &r.log_density, &r.balance});
  core::check_output(kForward, "keys", r.keys, {&q_bar, &k_bar, &noise, &counts, &r.log_density, &r.balance});
  core::check_output(kForward, "log_density", r.log_density, {&q_bar, &k_bar, &noise, &counts, &r.balance});
  core::check_output(kForward, "balance", r.balance, {&q_bar, &k_bar, &noise, &counts});
  args.w = core::operand(r.w), args.keys = core::operand(r.keys);
  args.log_density = core::operand(r.log_density), args.balance = core::operand(r.balance);
  return args;
}

MixtureProposalsArgs check_backward(const Queue& queue, const MixtureProposalsCotangents& c, const ConstTensor& q_bar,
                                    const ConstTensor& k_bar, const ConstTensor& noise,
                                    const MixtureProposalsOptions& options, const Tensor& dmu) {
  MixtureProposalsArgs args = check_inputs(kBackward, queue, q_bar, k_bar, noise, options, kAny);
  if (c.dw.defined()) check_samples(kBackward, "dw", queue, c.dw, 4, args);
  check_under(kBackward, "dkeys", queue, c.dkeys, 4, args, Mis::biased, false);
  if (c.dlog_density.defined()) check_samples(kBackward, "dlog_density", queue, c.dlog_density, 3, args);
  check_under(kBackward, "dbalance", queue, c.dbalance, 3, args, Mis::opt, false);
  core::check_array(kBackward, "dmu", queue, dmu,
                    {{"B", args.batch}, {"H", args.heads_q}, {"C", args.landmarks}, {"D", args.dim}}, {DType::f32});
  core::check_output(kBackward, "dmu", dmu,
                     {&q_bar, &k_bar, &noise, &options.counts, &c.dw, &c.dkeys, &c.dlog_density, &c.dbalance});
  args.dw = core::operand(c.dw), args.dkeys = core::operand(c.dkeys);
  args.dlog_density = core::operand(c.dlog_density), args.dbalance = core::operand(c.dbalance);
  args.dmu = core::operand(dmu);
  return args;
}

}  // namespace

void mixture_proposals(const Queue& queue, ConstTensor q_bar, ConstTensor k_bar, ConstTensor noise,
                       const MixtureProposalsOptions& options, const MixtureProposals& result, Workspace workspace) {
  const MixtureProposalsArgs args = check_forward(queue, q_bar, k_bar, noise, options, result);
  core::launch(kForward, queue, &Kernels::mixture_proposals, args, workspace);
}

int64_t mixture_proposals_workspace_bytes(const Queue& queue, ConstTensor q_bar, ConstTensor k_bar, ConstTensor noise,
                                          const MixtureProposalsOptions& options, const MixtureProposals& result) {
  return core::workspace_bytes(kForward, queue, &Kernels::mixture_proposals,
                               check_forward(queue, q_bar, k_bar, noise, options, result));
}

void mixture_proposals_bwd(const Queue& queue, const MixtureProposalsCotangents& cotangents, ConstTensor q_bar,
                           ConstTensor k_bar, ConstTensor noise, const MixtureProposalsOptions& options, Tensor dmu,
                           Workspace workspace) {
  const MixtureProposalsArgs args = check_backward(queue, cotangents, q_bar, k_bar, noise, options, dmu);
  core::launch(kBackward, queue, &Kernels::mixture_proposals_bwd, args, workspace);
}

int64_t mixture_proposals_bwd_workspace_bytes(const Queue& queue, const MixtureProposalsCotangents& cotangents,
                                              ConstTensor q_bar, ConstTensor k_bar, ConstTensor noise,
                                              const MixtureProposalsOptions& options, Tensor dmu) {
  return core::workspace_bytes(kBackward, queue, &Kernels::mixture_proposals_bwd,
                               check_backward(queue, cotangents, q_bar, k_bar, noise, options, dmu));
}

}  // namespace subquad
