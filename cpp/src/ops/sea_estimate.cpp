#include "subquad/sea_estimate.h"

#include <string>

#include "core/registry.h"

namespace subquad {
namespace {

using core::kAny;

const char* const kOp = "sea_estimate";

void check_rule(bool holds, const char* argument, const char* expected, const std::string& got) {
  if (!holds) core::invalid(kOp, argument, expected, got);
}

void check_inputs(const Queue& queue, const ConstTensor& q, const ConstTensor& k, const ConstTensor& v,
                  const SeaEstimateOptions& options, SeaEstimateArgs& a) {
  core::check_array(kOp, "q", queue, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  a.batch = q.shape[0], a.heads = q.shape[1], a.seq = q.shape[2], a.dim = q.shape[3];
  core::check_not_empty(kOp, "q", "D", a.dim);
  check_rule(a.seq <= INT32_MAX, "q", "N of at most 2147483647", std::to_string(a.seq));
  const auto check = [&](const char* argument, const ConstTensor& t) {
    core::check_array(kOp, argument, queue, t, {{"B", a.batch}, {"H", a.heads}, {"N", a.seq}, {"D", a.dim}}, {q.dtype});
  };
  check("k", k), check("v", v);
  a.is_causal = options.is_causal;
  if (options.key_mask.defined())
    core::check_array(kOp, "key_mask", queue, options.key_mask, {{"B", a.batch}, {"N", a.seq}}, {DType::boolean});
  a.q = core::operand(q), a.k = core::operand(k), a.v = core::operand(v);
  a.key_mask = core::operand(options.key_mask);
}

void check_outputs(const Queue& queue, const Tensor& probs, const Tensor& row_scale, const Tensor& mix,
                   SeaEstimateArgs& a) {
  core::check_array(kOp, "probs", queue, probs, {{"B", a.batch}, {"H", a.heads}, {"N", a.seq}, {"K", kAny}},
                    {DType::f32});
  a.columns = probs.shape[3];
  const int64_t share = a.is_causal ? 4 : 2;
  check_rule(a.columns >= 4 && a.columns <= 4096 && a.columns % share == 0, "probs",
             a.is_causal ? "K a multiple of 4 in [4, 4096]" : "K a multiple of 2 in [4, 4096]",
             std::to_string(a.columns));
  a.width = a.columns / share, a.splits = a.is_causal ? 2 : 4, a.channels = a.splits * a.heads;
  const auto check = [&](const char* argument, const Tensor& t) {
    core::check_array(kOp, argument, queue, t, {{"B", a.batch}, {"H", a.heads}, {"N", a.seq}}, {DType::f32});
  };
  check("row_scale", row_scale), check("mix", mix);
  a.probs = core::operand(probs), a.row_scale = core::operand(row_scale), a.mix = core::operand(mix);
}

Operand check_weight(const Queue& queue, const char* argument, const ConstTensor& t,
                     std::initializer_list<core::Axis> axes) {
  core::check_array(kOp, argument, queue, t, axes, {DType::f32});
  int64_t step = 1;
  for (int i = t.rank - 1; i > 0; step *= t.shape[i], --i)
    check_rule(t.shape[i] <= 1 || t.stride[i] == step || t.numel() == 0, argument, "contiguous axes behind the first",
               "strides apart");
  return core::operand(t);
}

void check_causal_weights(const Queue& queue, const SeaWeights& w, SeaEstimateArgs& a) {
  SeaWeightArgs& to = a.weights;
  if (!a.is_causal) {
    const auto none = [](const char* argument, const ConstTensor& t) {
      check_rule(!t.defined(), argument, "none unless is_causal", "an array");
    };
    none("position", w.position);
    none("row_norm_weight", w.row_norm_weight), none("row_norm_bias", w.row_norm_bias);
    none("norm_weight", w.norm_weight), none("norm_bias", w.norm_bias);
    to.out_weight =
        check_weight(queue, "out_weight", w.out_weight, {{"H", a.heads}, {"C", a.channels}, {"3", 3}, {"3", 3}});
    return;
  }
  to.position = check_weight(queue, "position", w.position, {{"P", kAny}, {"d", a.dim}});
  a.positions = w.position.shape[0];
  to.row_norm_weight = check_weight(queue, "row_norm_weight", w.row_norm_weight, {{"w", a.width}});
  to.row_norm_bias = check_weight(queue, "row_norm_bias", w.row_norm_bias, {{"w", a.width}});
  to.norm_weight = check_weight(queue, "norm_weight", w.norm_weight, {{"K", a.columns}});
  to.norm_bias = check_weight(queue, "norm_bias", w.norm_bias, {{"K", a.columns}});
  to.out_weight = check_weight(queue, "out_weight", w.out_weight, {{"H", a.heads}, {"C", a.channels}});
}

void check_weights(const Queue& queue, const SeaWeights& w, SeaEstimateArgs& a) {
  SeaWeightArgs& to = a.weights;
  const int64_t width = 2 * a.dim, inputs = 3 * a.dim, outputs = a.splits * a.width, channels = a.channels;
  to.projection = check_weight(queue, "projection", w.projection, {{"m", kAny}, {"d", a.dim}});
  a.features = w.projection.shape[0];
  check_rule(a.features >= 1 && a.features <= 4096, "projection", "m in [1, 4096]", std::to_string(a.features));
  to.encoder_weight = check_weight(queue, "encoder_weight", w.encoder_weight, {{"2d", width}, {"3d", inputs}});
  to.encoder_bias = check_weight(queue, "encoder_bias", w.encoder_bias, {{"2d", width}});
  to.encoder_norm_weight = check_weight(queue, "encoder_norm_weight", w.encoder_norm_weight, {{"2d", width}});
  to.encoder_norm_bias = check_weight(queue, "encoder_norm_bias", w.encoder_norm_bias, {{"2d", width}});
  to.scaler_weight = check_weight(queue, "scaler_weight", w.scaler_weight, {{"2", 2}, {"2d", width}});
  to.scaler_bias = check_weight(queue, "scaler_bias", w.scaler_bias, {{"2", 2}});
  to.row_weight = check_weight(queue, "row_weight", w.row_weight, {{"w C / H", outputs}, {"2d", width}});
  to.row_bias = check_weight(queue, "row_bias", w.row_bias, {{"w C / H", outputs}});
  const auto convolution = [&](const char* argument, const ConstTensor& t) {
    return check_weight(queue, argument, t, {{"C", channels}, {"C", channels}, {"3", 3}, {"3", 3}});
  };
  to.conv1_weight = convolution("conv1_weight", w.conv1_weight);
  to.conv1_bias = check_weight(queue, "conv1_bias", w.conv1_bias, {{"C", channels}});
  to.conv2_weight = convolution("conv2_weight", w.conv2_weight);
  to.conv2_bias = check_weight(queue, "conv2_bias", w.conv2_bias, {{"C", channels}});
  check_causal_weights(queue, w, a);
  to.out_bias = check_weight(queue, "out_bias", w.out_bias, {{"H", a.heads}});
}

/// Checks a state, of which all or nothing is given.
SeaStateArgs check_state(const Queue& queue, const std::string& name, const SeaState& state, const SeaEstimateArgs& a) {
  const bool any =
      state.s.defined() || state.z.defined() || state.rows1.defined() || state.rows2.defined() || state.count.defined();
  if (!any) return {};
  check_rule(a.is_causal, name.c_str(), "none unless is_causal", "a state");
  const auto check = [&](const char* member, const ConstTensor& t, std::initializer_list<core::Axis> axes,
                         DType dtype) {
    core::check_array(kOp, (name + "." + member).c_str(), queue, t, axes, {dtype});
    return core::operand(t);
  };
  const std::initializer_list<core::Axis> rows = {{"B", a.batch}, {"C", a.channels}, {"4", 4}, {"w", a.width}};
  SeaStateArgs to = {};
  to.s = check("s", state.s, {{"B", a.batch}, {"H", a.heads}, {"m", a.features}, {"2d", 2 * a.dim}}, DType::f32);
  to.z = check("z", state.z, {{"B", a.batch}, {"H", a.heads}, {"m", a.features}}, DType::f32);
  to.rows1 = check("rows1", state.rows1, rows, DType::f32);
  to.rows2 = check("rows2", state.rows2, rows, DType::f32);
  to.count = check("count", state.count, {{"B", a.batch}}, DType::i32);
  return to;
}

/// Checks that no output overlaps an input or another output.
void check_overlaps(const ConstTensor& q, const ConstTensor& k, const ConstTensor& v, const SeaWeights& w,
                    const SeaEstimateOptions& options, const SeaState& state, const Tensor& probs,
                    const Tensor& row_scale, const Tensor& mix, const SeaState& next) {
  const struct {
    const char* name;
    const ConstTensor* array;
  } outputs[] = {{"probs", &probs},
                 {"row_scale", &row_scale},
                 {"mix", &mix},
                 {"new_state.s", &next.s},
                 {"new_state.z", &next.z},
                 {"new_state.rows1", &next.rows1},
                 {"new_state.rows2", &next.rows2},
                 {"new_state.count", &next.count}};
  for (const auto& output : outputs)
    for (const auto& other : outputs)
      if (other.array != output.array) core::check_output(kOp, output.name, *output.array, {other.array});
  const auto apart_from = [&](std::initializer_list<const ConstTensor*> inputs) {
    for (const auto& output : outputs) core::check_output(kOp, output.name, *output.array, inputs);
  };
  apart_from({&q, &k, &v, &options.key_mask});
  apart_from({&state.s, &state.z, &state.rows1, &state.rows2, &state.count});
  apart_from({&w.projection, &w.position, &w.encoder_weight, &w.encoder_bias, &w.encoder_norm_weight});
  apart_from({&w.encoder_norm_bias, &w.scaler_weight, &w.scaler_bias, &w.row_weight, &w.row_bias});
  apart_from({&w.row_norm_weight, &w.row_norm_bias, &w.conv1_weight, &w.conv1_bias, &w.conv2_weight, &w.conv2_bias});
  apart_from({&w.out_weight, &w.out_bias, &w.norm_weight, &w.norm_bias});
}

SeaEstimateArgs check_all(const Queue& queue, const ConstTensor& q, const ConstTensor& k, const ConstTensor& v,
                          const SeaWeights& weights, const SeaEstimateOptions& options, const SeaState& state,
                          const Tensor& probs, const Tensor& row_scale, const Tensor& mix, const SeaState& new_state) {
  SeaEstimateArgs a = {};
  check_inputs(queue, q, k, v, options, a);
  check_outputs(queue, probs, row_scale, mix, a);
  check_weights(queue, weights, a);
  a.state = check_state(queue, "state", state, a);
  a.new_state = check_state(queue, "new_state", new_state, a);
  check_overlaps(q, k, v, weights, options, state, probs, row_scale, mix, new_state);
  return a;
}

/// Checks that `position` has a row for every token. Reads the mask and the counts, so on the CPU only.
void check_capacity(const SeaEstimateArgs& a) {
  const auto* before = static_cast<const int32_t*>(a.state.count.data);
  for (int64_t b = 0; b < a.batch; ++b) {
    check_rule(!before || before[b] >= 0, "state.count", "values of at least 0",
               before ? std::to_string(before[b]) : "none");
    int64_t tokens = a.seq;
    if (a.key_mask.data) {
      const bool* mask = static_cast<const bool*>(a.key_mask.data) + b * a.key_mask.stride[0];
      tokens = 0;
      for (int64_t n = 0; n < a.seq; ++n) tokens += mask[n];
    }
    if (before) tokens += before[b];
    if (tokens > a.positions)
      core::invalid(kOp, "position",
                    "at least " + std::to_string(tokens) + " rows, the tokens of item " + std::to_string(b),
                    std::to_string(a.positions));
    check_rule(tokens <= INT32_MAX, "state.count", "at most 2147483647 tokens in all", std::to_string(tokens));
  }
}

}  // namespace

void sea_estimate(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const SeaWeights& weights,
                  const SeaEstimateOptions& options, const SeaState& state, Tensor probs, Tensor row_scale, Tensor mix,
                  const SeaState& new_state, Workspace workspace) {
  const SeaEstimateArgs args = check_all(queue, q, k, v, weights, options, state, probs, row_scale, mix, new_state);
  if (args.is_causal && queue.device.type == DeviceType::cpu) check_capacity(args);
  core::launch(kOp, queue, &Kernels::sea_estimate, args, workspace);
}

int64_t sea_estimate_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                     const SeaWeights& weights, const SeaEstimateOptions& options,
                                     const SeaState& state, Tensor probs, Tensor row_scale, Tensor mix,
                                     const SeaState& new_state) {
  return core::workspace_bytes(kOp, queue, &Kernels::sea_estimate,
                               check_all(queue, q, k, v, weights, options, state, probs, row_scale, mix, new_state));
}

}  // namespace subquad
