#include "subquad/random.h"

#include "core/registry.h"

namespace subquad {
namespace {

/// [..., H, N, D] as [leading, N, D]; the counters of the kernels know no more axes.
ConstTensor as_three_axes(const char* op, const ConstTensor& out) {
  ConstTensor flat = out;
  flat.rank = 3;
  for (int i = 0; i < 3; ++i) flat.shape[i] = 1, flat.stride[i] = 0;
  for (int i = 1; i <= 2 && i <= out.rank; ++i) {
    flat.shape[3 - i] = out.shape[out.rank - i];
    flat.stride[3 - i] = out.stride[out.rank - i];
  }
  const bool empty = out.numel() == 0;
  for (int i = out.rank - 3; i >= 0; --i) {
    if (out.shape[i] != 1 && flat.shape[0] != 1 && !empty && out.stride[i] != flat.shape[0] * flat.stride[0])
      core::invalid(op, "out", "axes before the last two that flatten without a copy",
                    "stride " + std::to_string(out.stride[i]) + " of axis " + std::to_string(i));
    if (flat.shape[0] == 1) flat.stride[0] = out.stride[i];
    flat.shape[0] *= out.shape[i];
  }
  return flat;
}

void fill(const char* op, const Queue& queue, Distribution distribution, Seed seed, uint32_t stream,
          const Tensor& out) {
  const ConstTensor flat = as_three_axes(op, out);
  core::check_array(op, "out", queue, flat, {{"...", core::kAny}, {"N", core::kAny}, {"D", core::kAny}}, {DType::f32});
  const int64_t counters = int64_t(1) << 32;
  if (flat.shape[0] > counters || flat.shape[1] > counters || flat.shape[2] > 4 * counters)
    core::invalid(op, "out", "at most 2^32 rows and 2^32 leading elements", core::shape_string(out));
  core::check_output(op, "out", out, {});
  RandomArgs args = {};
  args.leading = flat.shape[0], args.rows = flat.shape[1], args.cols = flat.shape[2];
  args.distribution = distribution;
  args.stream = stream;
  args.seed = seed.value;
  args.seed_ptr = seed.pointer;
  args.out = core::operand(flat);
  if (flat.numel() > 0) core::launch(op, queue, &Kernels::random, args, Workspace());
}

}  // namespace

void random_uniform(const Queue& queue, Seed seed, uint32_t stream, Tensor out) {
  fill("random_uniform", queue, Distribution::uniform, seed, stream, out);
}

void random_normal(const Queue& queue, Seed seed, uint32_t stream, Tensor out) {
  fill("random_normal", queue, Distribution::normal, seed, stream, out);
}

void random_signs(const Queue& queue, Seed seed, uint32_t stream, Tensor out) {
  fill("random_signs", queue, Distribution::sign, seed, stream, out);
}

}  // namespace subquad
