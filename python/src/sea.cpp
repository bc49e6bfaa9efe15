#include "call.h"
#include "pattern.h"
#include "states.h"
#include "subquad/block_pool.h"
#include "subquad/running_mean.h"
#include "subquad/sea_attention.h"
#include "subquad/sea_estimate.h"

namespace subquad::python {
namespace {

using nb::handle;

RunningMeanState mean_state_in(Border& border, const nb::list& parts) {
  return {read_only(border, "state sum", parts[0]), read_only(border, "state count", parts[1])};
}

void mean(handle v_, handle key_mask_, const nb::list& state_, handle out_, const nb::list& new_state_) {
  constexpr const char* op = "running_mean";
  Border border(op);
  const ConstTensor v = border.in("v", v_), key_mask = border.in("key_mask", key_mask_);
  const RunningMeanState state = mean_state_in(border, state_);
  const Tensor out = border.out("out", out_);
  const RunningMeanState new_state = {optional_out(border, "new_state sum", new_state_[0]),
                                      optional_out(border, "new_state count", new_state_[1])};
  same_dtype(op, {{"v", &v}, {"out", &out}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return running_mean_workspace_bytes(queue, v, key_mask, state, out, new_state); },
      [&](Workspace w) { running_mean(queue, v, key_mask, state, out, new_state, w); });
}

void mean_bwd(handle dout_, handle v_, handle key_mask_, const nb::list& state_, handle dv_) {
  constexpr const char* op = "running_mean_bwd";
  Border border(op);
  const ConstTensor dout = border.in("dout", dout_), v = border.in("v", v_);
  const ConstTensor key_mask = border.in("key_mask", key_mask_);
  const RunningMeanState state = mean_state_in(border, state_);
  const Tensor dv = border.out("dv", dv_);
  same_dtype(op, {{"v", &v}, {"dout", &dout}, {"dv", &dv}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return running_mean_bwd_workspace_bytes(queue, dout, {}, key_mask, state, dv); },
      [&](Workspace w) { running_mean_bwd(queue, dout, {}, key_mask, state, dv, w); });
}

void pool(handle v_, handle probs_, handle key_mask_, handle query_mask_, handle out_) {
  constexpr const char* op = "block_pool";
  Border border(op);
  const ConstTensor v = border.in("v", v_), probs = border.in("probs", probs_);
  const ConstTensor key_mask = border.in("key_mask", key_mask_), query_mask = border.in("query_mask", query_mask_);
  const Tensor out = border.out("out", out_);
  same_dtype(op, {{"v", &v}, {"out", &out}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return block_pool_workspace_bytes(queue, v, probs, key_mask, query_mask, out); },
      [&](Workspace w) { block_pool(queue, v, probs, key_mask, query_mask, out, w); });
}

void pool_bwd(handle dout_, handle v_, handle probs_, handle key_mask_, handle query_mask_, handle dv_,
              handle dprobs_) {
  constexpr const char* op = "block_pool_bwd";
  Border border(op);
  const ConstTensor dout = border.in("dout", dout_), v = border.in("v", v_), probs = border.in("probs", probs_);
  const ConstTensor key_mask = border.in("key_mask", key_mask_), query_mask = border.in("query_mask", query_mask_);
  const Tensor dv = border.out("dv", dv_), dprobs = border.out("dprobs", dprobs_);
  same_dtype(op, {{"v", &v}, {"dout", &dout}, {"dv", &dv}});
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] { return block_pool_bwd_workspace_bytes(queue, dout, {}, v, probs, key_mask, query_mask, dv, dprobs); },
      [&](Workspace w) { block_pool_bwd(queue, dout, {}, v, probs, key_mask, query_mask, dv, dprobs, w); });
}

SeaAttentionOptions sea_options(const char* op, const Keywords& keywords) {
  SeaAttentionOptions o;
  o.select = select_options(op, keywords);
  if (!keywords.at("block_cap").is_none()) {
    o.block_cap = keywords.integer("block_cap");
    if (o.block_cap < 1)
      throw std::invalid_argument(
          sentence(op, "block_cap", "None or a value of at least 1", std::to_string(o.block_cap)));
  }
  o.scale = keywords.scale();
  o.row_scale = keywords.array("row_scale"), o.mix = keywords.array("mix"), o.context = keywords.array("context");
  o.key_mask = keywords.array("key_mask"), o.query_mask = keywords.array("query_mask");
  o.is_causal = keywords.boolean("is_causal");
  return o;
}

void sea(handle q_, handle k_, handle v_, handle probs_, const nb::dict& given, handle out_, handle lse_,
         const nb::list& pattern_) {
  constexpr const char* op = "sea_attention";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor probs = border.in("probs", probs_);
  const SeaAttentionOptions options = sea_options(op, Keywords(op, border, given));
  const Tensor out = border.out("out", out_), lse = optional_out(border, "lse", lse_);
  const SeaPattern pattern = {optional_out(border, "bits", pattern_[0]), optional_out(border, "visible", pattern_[1]),
                              optional_out(border, "positions", pattern_[2])};
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return sea_attention_workspace_bytes(queue, q, k, v, probs, options, out, lse, pattern); },
      [&](Workspace w) { sea_attention(queue, q, k, v, probs, options, out, lse, pattern, w); });
}

void sea_bwd(handle dout_, handle dlse_, handle q_, handle k_, handle v_, handle probs_, const nb::dict& given,
             handle dq, handle dk, handle dv, handle dprobs, handle drow_scale, handle dmix, handle dcontext) {
  constexpr const char* op = "sea_attention_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor probs = border.in("probs", probs_);
  const ConstTensor dout = border.in("dout", dout_), dlse = border.in("dlse", dlse_);
  const SeaAttentionOptions options = sea_options(op, Keywords(op, border, given));
  SeaAttentionGradients g;
  g.dq = border.out("dq", dq), g.dk = border.out("dk", dk), g.dv = border.out("dv", dv);
  g.dprobs = optional_out(border, "dprobs", dprobs);
  g.drow_scale = optional_out(border, "drow_scale", drow_scale);
  g.dmix = optional_out(border, "dmix", dmix);
  g.dcontext = optional_out(border, "dcontext", dcontext);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return sea_attention_bwd_workspace_bytes(queue, dout, dlse, q, k, v, probs, options, g); },
      [&](Workspace w) { sea_attention_bwd(queue, dout, dlse, q, k, v, probs, options, g, w); });
}

SeaWeights weights_of(const Keywords& keywords) {
  SeaWeights w;
  const std::pair<const char*, ConstTensor*> parts[] = {
      {"projection", &w.projection},
      {"position", &w.position},
      {"encoder_weight", &w.encoder_weight},
      {"encoder_bias", &w.encoder_bias},
      {"encoder_norm_weight", &w.encoder_norm_weight},
      {"encoder_norm_bias", &w.encoder_norm_bias},
      {"scaler_weight", &w.scaler_weight},
      {"scaler_bias", &w.scaler_bias},
      {"row_weight", &w.row_weight},
      {"row_bias", &w.row_bias},
      {"row_norm_weight", &w.row_norm_weight},
      {"row_norm_bias", &w.row_norm_bias},
      {"conv1_weight", &w.conv1_weight},
      {"conv1_bias", &w.conv1_bias},
      {"conv2_weight", &w.conv2_weight},
      {"conv2_bias", &w.conv2_bias},
      {"out_weight", &w.out_weight},
      {"out_bias", &w.out_bias},
      {"norm_weight", &w.norm_weight},
      {"norm_bias", &w.norm_bias},
  };
  for (const auto& [name, part] : parts) *part = keywords.array(name);
  return w;
}

void estimate(handle q_, handle k_, handle v_, const nb::dict& weights_, const nb::dict& given, const nb::list& state_,
              handle probs_, handle row_scale_, handle mix_, const nb::list& new_state_) {
  constexpr const char* op = "sea_estimate";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const SeaWeights weights = weights_of(Keywords(op, border, weights_));
  const Keywords keywords(op, border, given);
  SeaEstimateOptions options;
  options.is_causal = keywords.boolean("is_causal");
  options.key_mask = keywords.array("key_mask");
  const SeaState state = {read_only(border, "state s", state_[0]), read_only(border, "state z", state_[1]),
                          read_only(border, "state rows1", state_[2]), read_only(border, "state rows2", state_[3]),
                          read_only(border, "state count", state_[4])};
  const SeaState new_state = {
      optional_out(border, "new s", new_state_[0]), optional_out(border, "new z", new_state_[1]),
      optional_out(border, "new rows1", new_state_[2]), optional_out(border, "new rows2", new_state_[3]),
      optional_out(border, "new count", new_state_[4])};
  const Tensor probs = border.out("probs", probs_), row_scale = border.out("row_scale", row_scale_);
  const Tensor mix = border.out("mix", mix_);
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] {
        return sea_estimate_workspace_bytes(queue, q, k, v, weights, options, state, probs, row_scale, mix, new_state);
      },
      [&](Workspace w) { sea_estimate(queue, q, k, v, weights, options, state, probs, row_scale, mix, new_state, w); });
}

}  // namespace

void bind_sea(nb::module_& m) {
  define(m, "running_mean", &mean);
  define(m, "running_mean_bwd", &mean_bwd);
  define(m, "block_pool", &pool);
  define(m, "block_pool_bwd", &pool_bwd);
  define(m, "sea_attention", &sea);
  define(m, "sea_attention_bwd", &sea_bwd);
  define(m, "sea_estimate", &estimate);
}

}  // namespace subquad::python
