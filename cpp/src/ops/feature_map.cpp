#include "subquad/feature_map.h"

#include <cmath>

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kForward = "feature_map";
const char* const kBackward = "feature_map_bwd";
const auto kFloats = {DType::f32, DType::f16, DType::bf16};

float scale_of(const char* op, const FeatureMapOptions& options, int64_t dim) {
  if (options.scale == 0) return float(1.0 / std::sqrt(double(dim)));
  const float scale = float(options.scale);
  if (!(scale > 0) || std::isinf(scale))
    core::invalid(op, "scale", "a finite number above 0, or 0 for D^-1/2", std::to_string(options.scale));
  return scale;
}

void check_projection(const char* op, const Queue& queue, const ConstTensor& projection, int64_t heads, int64_t dim) {
  core::check_array(op, "projection", queue, projection, {{"Hp", core::kAny}, {"F", core::kAny}, {"D", dim}},
                    {DType::f32});
  const int64_t blocks = projection.shape[0];
  if (blocks != 1 && (blocks == 0 ? heads != 0 : heads % blocks != 0))
    core::invalid(op, "projection", "a leading axis that divides H = " + std::to_string(heads), std::to_string(blocks));
  if (projection.shape[1] == 0) core::invalid(op, "projection", "F of at least 1", "0");
}

/// What both passes share: x, the projection, the options, and the fields of Args that they give.
FeatureMapArgs check_inputs(const char* op, const Queue& queue, const ConstTensor& x, const ConstTensor& projection,
                            const FeatureMapOptions& options) {
  using core::kAny;
  core::check_array(op, "x", queue, x, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, kFloats);
  if (x.shape[3] == 0) core::invalid(op, "x", "D of at least 1", "0");
  if (options.mask.defined())
    core::check_array(op, "mask", queue, options.mask, {{"B", x.shape[0]}, {"N", x.shape[2]}}, {DType::boolean});
  const Features features = options.features;
  if (options.log && features != Features::positive && features != Features::hyperbolic)
    core::invalid(op, "log", "False with other features than positive and hyperbolic", "True");
  FeatureMapArgs args = {};
  args.batch = x.shape[0], args.heads = x.shape[1], args.seq = x.shape[2], args.dim = x.shape[3];
  args.features = features, args.log = options.log;
  args.projection_heads = 1;
  if (features == Features::elu) {
    if (projection.defined()) core::invalid(op, "projection", "none with elu features", "an array");
    if (options.scale != 0) core::invalid(op, "scale", "none with elu features", std::to_string(options.scale));
  } else {
    check_projection(op, queue, projection, x.shape[1], x.shape[3]);
    args.projection_heads = projection.shape[0], args.num_features = projection.shape[1];
    args.scale = scale_of(op, options, x.shape[3]);
  }
  args.feature_dim = feature_dim(features, args.num_features, args.dim);
  args.x = core::operand(x), args.projection = core::operand(projection), args.mask = core::operand(options.mask);
  return args;
}

/// An array [B, H, N] that only trig features have.
void check_log_factor(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                      const FeatureMapArgs& args) {
  if (!t.defined()) return;
  if (args.features != Features::trig) core::invalid(op, argument, "none with other features than trig", "an array");
  core::check_array(op, argument, queue, t, {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}}, {DType::f32});
}

FeatureMapArgs check_forward(const Queue& queue, const ConstTensor& x, const ConstTensor& projection,
                             const FeatureMapOptions& options, const Tensor& out, const Tensor& log_factor) {
  FeatureMapArgs args = check_inputs(kForward, queue, x, projection, options);
  core::check_array(kForward, "out", queue, out,
                    {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}, {"F'", args.feature_dim}}, kFloats);
  check_log_factor(kForward, "log_factor", queue, log_factor, args);
  core::check_output(kForward, "out", out, {&x, &projection, &options.mask, &log_factor});
  core::check_output(kForward, "log_factor", log_factor, {&x, &projection, &options.mask});
  args.out = core::operand(out), args.log_factor = core::operand(log_factor);
  return args;
}

FeatureMapArgs check_backward(const Queue& queue, const ConstTensor& dout, const ConstTensor& dlog_factor,
                              const ConstTensor& x, const ConstTensor& projection, const FeatureMapOptions& options,
                              const Tensor& dx, const Tensor& dprojection) {
  FeatureMapArgs args = check_inputs(kBackward, queue, x, projection, options);
  core::check_array(kBackward, "dout", queue, dout,
                    {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}, {"F'", args.feature_dim}}, kFloats);
  check_log_factor(kBackward, "dlog_factor", queue, dlog_factor, args);
  if (dx.defined())
    core::check_array(kBackward, "dx", queue, dx,
                      {{"B", args.batch}, {"H", args.heads}, {"N", args.seq}, {"D", args.dim}}, kFloats);
  if (dprojection.defined()) {
    if (args.features == Features::elu) core::invalid(kBackward, "dprojection", "none with elu features", "an array");
    core::check_array(kBackward, "dprojection", queue, dprojection,
                      {{"Hp", args.projection_heads}, {"F", args.num_features}, {"D", args.dim}}, {DType::f32});
  }
  core::check_output(kBackward, "dx", dx, {&dout, &dlog_factor, &x, &projection, &options.mask, &dprojection});
  core::check_output(kBackward, "dprojection", dprojection, {&dout, &dlog_factor, &x, &projection, &options.mask});
  args.dout = core::operand(dout), args.dlog_factor = core::operand(dlog_factor);
  args.dx = core::operand(dx), args.dprojection = core::operand(dprojection);
  return args;
}

}  // namespace

int64_t feature_dim(Features features, int64_t num_features, int64_t dim) {
  if (features == Features::elu) return dim;
  return features == Features::trig || features == Features::hyperbolic ? 2 * num_features : num_features;
}

void feature_map(const Queue& queue, ConstTensor x, ConstTensor projection, const FeatureMapOptions& options,
                 Tensor out, Tensor log_factor, Workspace workspace) {
  core::launch(kForward, queue, &Kernels::feature_map, check_forward(queue, x, projection, options, out, log_factor),
               workspace);
}

int64_t feature_map_workspace_bytes(const Queue& queue, ConstTensor x, ConstTensor projection,
                                    const FeatureMapOptions& options, Tensor out, Tensor log_factor) {
  return core::workspace_bytes(kForward, queue, &Kernels::feature_map,
                               check_forward(queue, x, projection, options, out, log_factor));
}

void feature_map_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlog_factor, ConstTensor x,
                     ConstTensor projection, const FeatureMapOptions& options, Tensor dx, Tensor dprojection,
                     Workspace workspace) {
  core::launch(kBackward, queue, &Kernels::feature_map_bwd,
               check_backward(queue, dout, dlog_factor, x, projection, options, dx, dprojection), workspace);
}

int64_t feature_map_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlog_factor, ConstTensor x,
                                        ConstTensor projection, const FeatureMapOptions& options, Tensor dx,
                                        Tensor dprojection) {
  return core::workspace_bytes(kBackward, queue, &Kernels::feature_map_bwd,
                               check_backward(queue, dout, dlog_factor, x, projection, options, dx, dprojection));
}

}  // namespace subquad
