#include "call.h"
#include "keywords.h"
#include "states.h"
#include "subquad/feature_map.h"
#include "subquad/linear_attention.h"
#include "subquad/mixture_proposals.h"
#include "subquad/mixture_weights.h"
#include "subquad/orthogonal_projection.h"
#include "subquad/sampled_proposals.h"

namespace subquad::python {
namespace {

using nb::handle;

FeatureMapOptions map_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  FeatureMapOptions o;
  o.features = features_of(op, keywords.at("features"));
  o.scale = keywords.scale();
  o.log = keywords.boolean("log");
  o.mask = keywords.array("mask");
  return o;
}

void map(handle x_, handle projection_, const nb::dict& keywords, handle out_, handle log_factor_) {
  constexpr const char* op = "feature_map";
  Border border(op);
  const ConstTensor x = border.in("x", x_), projection = border.in("projection", projection_);
  const FeatureMapOptions options = map_options(op, border, keywords);
  const Tensor out = border.out("out", out_), log_factor = optional_out(border, "log_factor", log_factor_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return feature_map_workspace_bytes(queue, x, projection, options, out, log_factor); },
      [&](Workspace w) { feature_map(queue, x, projection, options, out, log_factor, w); });
}

void map_bwd(handle dout_, handle dlog_factor_, handle x_, handle projection_, const nb::dict& keywords, handle dx_,
             handle dprojection_) {
  constexpr const char* op = "feature_map_bwd";
  Border border(op);
  const ConstTensor x = border.in("x", x_), projection = border.in("projection", projection_);
  const ConstTensor dout = border.in("dout", dout_), dlog_factor = border.in("dlog_factor", dlog_factor_);
  const FeatureMapOptions options = map_options(op, border, keywords);
  const Tensor dx = border.out("dx", dx_), dprojection = optional_out(border, "dprojection", dprojection_);
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] {
        return feature_map_bwd_workspace_bytes(queue, dout, dlog_factor, x, projection, options, dx, dprojection);
      },
      [&](Workspace w) { feature_map_bwd(queue, dout, dlog_factor, x, projection, options, dx, dprojection, w); });
}

int64_t width(const char* op, handle features, int64_t num_features, int64_t dim) {
  return feature_dim(features_of(op, features), num_features, dim);
}

void project(handle seed, handle kind_, handle out_) {
  constexpr const char* op = "orthogonal_projection";
  Border border(op);
  const Tensor out = border.out("out", out_);
  const Seed key = border.seed(seed);
  const auto kind = choice<ProjectionKind>(op, "kind", kind_,
                                           {{"haar", ProjectionKind::haar},
                                            {"hadamard", ProjectionKind::hadamard},
                                            {"published", ProjectionKind::published}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return orthogonal_projection_workspace_bytes(queue, key, kind, out); },
      [&](Workspace w) { orthogonal_projection(queue, key, kind, out, w); });
}

LinearAttentionOptions linear_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  LinearAttentionOptions o;
  o.log_features = keywords.boolean("log_features");
  o.key_log_weight = keywords.array("key_log_weight");
  o.key_mask = keywords.array("key_mask");
  o.is_causal = keywords.boolean("is_causal");
  o.normalize = keywords.boolean("normalize");
  o.gate = keywords.array("gate");
  o.decay = keywords.array("decay");
  return o;
}

void linear(handle fq_, handle fk_, handle v_, const nb::dict& keywords, const nb::list& state_, handle out_,
            const nb::list& new_state_) {
  constexpr const char* op = "linear_attention";
  Border border(op);
  const ConstTensor fq = border.in("fq", fq_), fk = border.in("fk", fk_), v = border.in("v", v_);
  const LinearAttentionOptions options = linear_options(op, border, keywords);
  const LinearAttentionState state = state_in(border, state_);
  const Tensor out = border.out("out", out_);
  const LinearAttentionState new_state = state_out(border, new_state_);
  same_dtype(op, {{"v", &v}, {"out", &out}});
  same_dtype(op, {{"fq", &fq}, {"fk", &fk}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return linear_attention_workspace_bytes(queue, fq, fk, v, options, state, out, new_state); },
      [&](Workspace w) { linear_attention(queue, fq, fk, v, options, state, out, new_state, w); });
}

void linear_bwd(handle dout_, handle fq_, handle fk_, handle v_, const nb::dict& keywords, const nb::list& state_,
                handle dfq, handle dfk, handle dv, handle dkey_log_weight, handle dgate) {
  constexpr const char* op = "linear_attention_bwd";
  Border border(op);
  const ConstTensor fq = border.in("fq", fq_), fk = border.in("fk", fk_), v = border.in("v", v_);
  const ConstTensor dout = border.in("dout", dout_);
  const LinearAttentionOptions options = linear_options(op, border, keywords);
  const LinearAttentionState state = state_in(border, state_);
  const LinearAttentionGradients gradients = {border.out("dfq", dfq), border.out("dfk", dfk), border.out("dv", dv),
                                              optional_out(border, "dkey_log_weight", dkey_log_weight),
                                              optional_out(border, "dgate", dgate)};
  same_dtype(op, {{"v", &v}, {"dout", &dout}});
  same_dtype(op, {{"fq", &fq}, {"fk", &fk}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return linear_attention_bwd_workspace_bytes(queue, dout, fq, fk, v, options, state, gradients); },
      [&](Workspace w) { linear_attention_bwd(queue, dout, fq, fk, v, options, state, gradients, w); });
}

void sampled(handle q_, handle k_, handle indices_, handle noise_, handle noise_std, handle w_) {
  constexpr const char* op = "sampled_proposals";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_);
  const ConstTensor indices = border.in("indices", indices_), noise = border.in("noise", noise_);
  const Tensor w = border.out("w", w_);
  const double factor = number(op, "noise_std", noise_std);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  sampled_proposals(queue, q, k, indices, noise, factor, w);
}

void sampled_bwd(handle dw_, handle score_, handle q_, handle k_, handle indices_, const nb::dict& given, handle dq_,
                 handle dk_) {
  constexpr const char* op = "sampled_proposals_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), indices = border.in("indices", indices_);
  const ConstTensor dw = border.in("dw", dw_), score = border.in("score", score_);
  const double given_scale = Keywords(op, border, given).scale();
  const Tensor dq = border.out("dq", dq_), dk = border.out("dk", dk_);
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] { return sampled_proposals_bwd_workspace_bytes(queue, dw, score, q, k, indices, given_scale, dq, dk); },
      [&](Workspace w) { sampled_proposals_bwd(queue, dw, score, q, k, indices, given_scale, dq, dk, w); });
}

MixtureProposalsOptions proposal_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  MixtureProposalsOptions o;
  o.scale = keywords.scale();
  o.noise_std = keywords.number("noise_std");
  o.antithetic = keywords.boolean("antithetic");
  o.mis = mis_of(op, keywords.at("mis"));
  o.counts = keywords.array("counts");
  return o;
}

void mixture(handle q_bar_, handle k_bar_, handle noise_, const nb::dict& keywords, handle w, handle keys,
             handle log_density, handle balance) {
  constexpr const char* op = "mixture_proposals";
  Border border(op);
  const ConstTensor q_bar = border.in("q_bar", q_bar_), k_bar = border.in("k_bar", k_bar_);
  const ConstTensor noise = border.in("noise", noise_);
  const MixtureProposalsOptions options = proposal_options(op, border, keywords);
  const MixtureProposals result = {border.out("w", w), optional_out(border, "keys", keys),
                                   border.out("log_density", log_density), optional_out(border, "balance", balance)};
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return mixture_proposals_workspace_bytes(queue, q_bar, k_bar, noise, options, result); },
      [&](Workspace space) { mixture_proposals(queue, q_bar, k_bar, noise, options, result, space); });
}

void mixture_bwd(handle dw, handle dkeys, handle dlog_density, handle dbalance, handle q_bar_, handle k_bar_,
                 handle noise_, const nb::dict& keywords, handle dmu_) {
  constexpr const char* op = "mixture_proposals_bwd";
  Border border(op);
  const ConstTensor q_bar = border.in("q_bar", q_bar_), k_bar = border.in("k_bar", k_bar_);
  const ConstTensor noise = border.in("noise", noise_);
  const MixtureProposalsCotangents cotangents = {border.in("dw", dw), border.in("dkeys", dkeys),
                                                 border.in("dlog_density", dlog_density),
                                                 border.in("dbalance", dbalance)};
  const MixtureProposalsOptions options = proposal_options(op, border, keywords);
  const Tensor dmu = border.out("dmu", dmu_);
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] { return mixture_proposals_bwd_workspace_bytes(queue, cotangents, q_bar, k_bar, noise, options, dmu); },
      [&](Workspace space) { mixture_proposals_bwd(queue, cotangents, q_bar, k_bar, noise, options, dmu, space); });
}

MixtureWeightsOptions weight_options(const char* op, Border& border, const nb::dict& given, bool over_queries) {
  const Keywords keywords(op, border, given);
  MixtureWeightsOptions o;
  o.scale = keywords.scale();
  o.alpha_coeff = keywords.number("alpha_coeff");
  o.over_queries = over_queries;
  o.query_mask = keywords.array("query_mask");
  o.counts = keywords.array("counts");
  return o;
}

void weights(handle q_, handle q_bar_, handle column_lse_, handle balance_, const nb::dict& keywords,
             handle log_alpha_) {
  constexpr const char* op = "mixture_weights";
  Border border(op);
  const ConstTensor q = border.in("q", q_), q_bar = border.in("q_bar", q_bar_);
  const ConstTensor column_lse = border.in("column_lse", column_lse_), balance = border.in("balance", balance_);
  const MixtureWeightsOptions options = weight_options(op, border, keywords, column_lse.defined());
  const Tensor log_alpha = border.out("log_alpha", log_alpha_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return mixture_weights_workspace_bytes(queue, q, q_bar, column_lse, balance, options, log_alpha); },
      [&](Workspace w) { mixture_weights(queue, q, q_bar, column_lse, balance, options, log_alpha, w); });
}

void weights_bwd(handle dlog_alpha_, handle q_, handle q_bar_, handle column_lse_, handle balance_,
                 const nb::dict& keywords, handle dq_, handle dq_bar_, handle dbalance_) {
  constexpr const char* op = "mixture_weights_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), q_bar = border.in("q_bar", q_bar_);
  const ConstTensor column_lse = border.in("column_lse", column_lse_), balance = border.in("balance", balance_);
  const ConstTensor dlog_alpha = border.in("dlog_alpha", dlog_alpha_);
  const MixtureWeightsOptions options = weight_options(op, border, keywords, column_lse.defined());
  const Tensor dq = border.out("dq", dq_), dq_bar = border.out("dq_bar", dq_bar_);
  const Tensor dbalance = border.out("dbalance", dbalance_);
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] {
        return mixture_weights_bwd_workspace_bytes(queue, dlog_alpha, q, q_bar, column_lse, balance, options, dq,
                                                   dq_bar, dbalance);
      },
      [&](Workspace w) {
        mixture_weights_bwd(queue, dlog_alpha, q, q_bar, column_lse, balance, options, dq, dq_bar, dbalance, w);
      });
}

}  // namespace

void bind_features(nb::module_& m) {
  define(m, "feature_map", &map);
  define(m, "feature_map_bwd", &map_bwd);
  define(m, "feature_dim", &width);
  define(m, "orthogonal_projection", &project);
  define(m, "linear_attention", &linear);
  define(m, "linear_attention_bwd", &linear_bwd);
  define(m, "sampled_proposals", &sampled);
  define(m, "sampled_proposals_bwd", &sampled_bwd);
  define(m, "mixture_proposals", &mixture);
  define(m, "mixture_proposals_bwd", &mixture_bwd);
  define(m, "mixture_weights", &weights);
  define(m, "mixture_weights_bwd", &weights_bwd);
}

}  // namespace subquad::python
