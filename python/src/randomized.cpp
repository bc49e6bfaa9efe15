#include "call.h"
#include "keywords.h"
#include "states.h"
#include "subquad/eva_attention.h"
#include "subquad/lara_attention.h"
#include "subquad/randomized_attention.h"
#include "subquad/rfa_attention.h"

namespace subquad::python {
namespace {

using nb::handle;

RfaOptions rfa_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  RfaOptions o;
  o.features = features_of(op, keywords.at("features"));
  o.num_features = keywords.integer("num_features");
  o.projection = keywords.array("projection");
  o.orthogonal = keywords.boolean("orthogonal");
  o.scale = keywords.scale();
  o.key_mask = keywords.array("key_mask");
  o.is_causal = keywords.boolean("is_causal");
  o.gate = keywords.array("gate");
  o.seed = keywords.seed();
  return o;
}

void rfa(handle q_, handle k_, handle v_, const nb::dict& keywords, const nb::list& state_, handle out_, handle lse_,
         const nb::list& new_state_) {
  Border border("rfa_attention");
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const RfaOptions options = rfa_options("rfa_attention", border, keywords);
  const LinearAttentionState state = state_in(border, state_);
  const Tensor out = border.out("out", out_), lse = optional_out(border, "lse", lse_);
  const LinearAttentionState new_state = state_out(border, new_state_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return rfa_attention_workspace_bytes(queue, q, k, v, options, state, out, lse, new_state); },
      [&](Workspace w) { rfa_attention(queue, q, k, v, options, state, out, lse, new_state, w); });
}

void rfa_bwd(handle dout_, handle q_, handle k_, handle v_, const nb::dict& keywords, const nb::list& state_,
             handle out_, handle lse_, handle dq, handle dk, handle dv, handle dprojection, handle dgate) {
  constexpr const char* op = "rfa_attention_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor dout = border.in("dout", dout_);
  const RfaOptions options = rfa_options(op, border, keywords);
  const LinearAttentionState state = state_in(border, state_);
  const ConstTensor out = border.in("out", out_), lse = border.in("lse", lse_);
  const RfaGradients g = {border.out("dq", dq), border.out("dk", dk), border.out("dv", dv),
                          optional_out(border, "dprojection", dprojection), optional_out(border, "dgate", dgate)};
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return rfa_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, state, out, lse, g); },
      [&](Workspace w) { rfa_attention_bwd(queue, dout, q, k, v, options, state, out, lse, g, w); });
}

/// "exact" is 0, which the core takes for scale^-1/2; "published" is 1; a number is itself.
double noise_std_of(const char* op, handle value) {
  if (PyUnicode_Check(value.ptr())) return choice<double>(op, "noise_std", value, {{"exact", 0}, {"published", 1}});
  const double given = number(op, "noise_std", value);
  if (!(given > 0) || given > 1.79769e308)
    throw std::invalid_argument(
        sentence(op, "noise_std", "\"exact\", \"published\" or a finite number above 0", nb::str(value).c_str()));
  return given;
}

RandomizedOptions randomized_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  RandomizedOptions o;
  o.num_samples = keywords.integer("num_samples");
  o.noise_std = noise_std_of(op, keywords.at("noise_std"));
  o.indices = keywords.array("indices");
  o.noise = keywords.array("noise");
  o.scale = keywords.scale();
  o.key_mask = keywords.array("key_mask");
  o.gradient = keywords.choice<RandomizedGradient>(
      "grad", {{"pathwise", RandomizedGradient::pathwise}, {"unbiased", RandomizedGradient::unbiased}});
  o.seed = keywords.seed();
  return o;
}

void randomized(handle q_, handle k_, handle v_, const nb::dict& keywords, handle out_) {
  Border border("randomized_attention");
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const RandomizedOptions options = randomized_options("randomized_attention", border, keywords);
  const Tensor out = border.out("out", out_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return randomized_attention_workspace_bytes(queue, q, k, v, options, out); },
      [&](Workspace w) { randomized_attention(queue, q, k, v, options, out, w); });
}

void randomized_bwd(handle dout_, handle q_, handle k_, handle v_, const nb::dict& keywords, handle dq_, handle dk_,
                    handle dv_) {
  constexpr const char* op = "randomized_attention_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor dout = border.in("dout", dout_);
  const RandomizedOptions options = randomized_options(op, border, keywords);
  const Tensor dq = border.out("dq", dq_), dk = border.out("dk", dk_), dv = border.out("dv", dv_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return randomized_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, dq, dk, dv); },
      [&](Workspace w) { randomized_attention_bwd(queue, dout, q, k, v, options, dq, dk, dv, w); });
}

LaraOptions lara_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  LaraOptions o;
  o.num_landmarks = keywords.integer("num_landmarks");
  o.q_bar = keywords.array("q_bar");
  o.k_bar = keywords.array("k_bar");
  o.mis = mis_of(op, keywords.at("mis"));
  o.alpha_coeff = keywords.number("alpha_coeff");
  o.t_over_queries = keywords.choice<bool>("t_norm", {{"query", true}, {"landmark", false}});
  o.samples_per_landmark = keywords.integer("samples_per_landmark");
  o.antithetic = keywords.boolean("antithetic");
  o.noise = keywords.array("noise");
  o.noise_std = noise_std_of(op, keywords.at("noise_std"));
  o.draw = !keywords.at("seed").is_none();
  if (o.draw) o.seed = keywords.seed();
  o.scale = keywords.scale();
  o.key_mask = keywords.array("key_mask");
  o.query_mask = keywords.array("query_mask");
  return o;
}

void lara(handle q_, handle k_, handle v_, const nb::dict& keywords, handle out_, handle lse_) {
  Border border("lara_attention");
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const LaraOptions options = lara_options("lara_attention", border, keywords);
  const Tensor out = border.out("out", out_), lse = optional_out(border, "lse", lse_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return lara_attention_workspace_bytes(queue, q, k, v, options, out, lse); },
      [&](Workspace w) { lara_attention(queue, q, k, v, options, out, lse, w); });
}

void lara_bwd(handle dout_, handle q_, handle k_, handle v_, const nb::dict& keywords, handle out_, handle lse_,
              handle dq, handle dk, handle dv, handle dq_bar, handle dk_bar) {
  constexpr const char* op = "lara_attention_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor dout = border.in("dout", dout_);
  const LaraOptions options = lara_options(op, border, keywords);
  const ConstTensor out = border.in("out", out_), lse = border.in("lse", lse_);
  const LaraGradients g = {border.out("dq", dq), border.out("dk", dk), border.out("dv", dv),
                           optional_out(border, "dq_bar", dq_bar), optional_out(border, "dk_bar", dk_bar)};
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return lara_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, out, lse, g); },
      [&](Workspace w) { lara_attention_bwd(queue, dout, q, k, v, options, out, lse, g, w); });
}

EvaOptions eva_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  EvaOptions o;
  o.window = keywords.integer("window");
  o.chunk_size = keywords.integer("chunk_size");
  o.k_bar = keywords.array("k_bar");
  o.mu = keywords.array("mu");
  o.noise = keywords.array("noise");
  o.draw = !keywords.at("seed").is_none();
  if (o.draw) o.seed = keywords.seed();
  o.partition = keywords.boolean("partition");
  o.chunk_mass = keywords.boolean("chunk_mass");
  o.scale = keywords.scale();
  o.key_mask = keywords.array("key_mask");
  o.is_causal = keywords.boolean("is_causal");
  return o;
}

void eva(handle q_, handle k_, handle v_, const nb::dict& keywords, const nb::list& past_, handle out_, handle lse_,
         const nb::list& chunks_) {
  Border border("eva_attention");
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const EvaOptions options = eva_options("eva_attention", border, keywords);
  const EvaChunks past = chunks_in(border, past_);
  const Tensor out = border.out("out", out_), lse = optional_out(border, "lse", lse_);
  const EvaChunks chunks = chunks_out(border, chunks_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return eva_attention_workspace_bytes(queue, q, k, v, options, past, out, lse, chunks); },
      [&](Workspace w) { eva_attention(queue, q, k, v, options, past, out, lse, chunks, w); });
}

void eva_bwd(handle dout_, handle q_, handle k_, handle v_, const nb::dict& keywords, const nb::list& past_,
             handle out_, handle lse_, handle dq, handle dk, handle dv, handle dk_bar, handle dmu) {
  constexpr const char* op = "eva_attention_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor dout = border.in("dout", dout_);
  const EvaOptions options = eva_options(op, border, keywords);
  const EvaChunks past = chunks_in(border, past_);
  const ConstTensor out = border.in("out", out_), lse = border.in("lse", lse_);
  const EvaGradients g = {border.out("dq", dq), border.out("dk", dk), border.out("dv", dv),
                          optional_out(border, "dk_bar", dk_bar), optional_out(border, "dmu", dmu)};
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return eva_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, past, out, lse, g); },
      [&](Workspace w) { eva_attention_bwd(queue, dout, q, k, v, options, past, out, lse, g, w); });
}

}  // namespace

void bind_randomized(nb::module_& m) {
  define(m, "rfa_attention", &rfa);
  define(m, "rfa_attention_bwd", &rfa_bwd);
  define(m, "randomized_attention", &randomized);
  define(m, "randomized_attention_bwd", &randomized_bwd);
  define(m, "lara_attention", &lara);
  define(m, "lara_attention_bwd", &lara_bwd);
  define(m, "eva_attention", &eva);
  define(m, "eva_attention_bwd", &eva_bwd);
}

}  // namespace subquad::python
