#include "subquad/orthogonal_projection.h"

#include "core/philox.h"
#include "core/registry.h"

namespace subquad {
namespace {

const char* const kOp = "orthogonal_projection";

/// One call: the checked arguments and the numbers to draw, behind which the kernel's own scratch follows. Without a
/// workspace the arrays lie at a made-up address, which is how the number of bytes is found.
struct Call {
  OrthogonalProjectionArgs args;
  Tensor normals, signs, lengths;
  Arena arena;
};

template <class Shape>
Tensor take_array(Arena& arena, const Queue& queue, const Shape& shape) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return make_tensor(take<float>(arena, count), shape, queue.device);
}

Call prepare(const Queue& queue, ProjectionKind kind, const Tensor& out, const Workspace* workspace) {
  core::check_array(kOp, "out", queue, out, {{"H", core::kAny}, {"F", core::kAny}, {"D", core::kAny}}, {DType::f32});
  if (out.shape[2] == 0) core::invalid(kOp, "out", "D of at least 1", "0");
  core::check_output(kOp, "out", out, {});
  Call call = {};
  OrthogonalProjectionArgs& args = call.args;
  args.heads = out.shape[0], args.num_features = out.shape[1], args.dim = out.shape[2], args.kind = kind;
  const bool hadamard = kind == ProjectionKind::hadamard;
  int64_t rows = hadamard ? 1 : args.dim;
  while (rows < args.dim) rows *= 2;
  args.blocks = (args.num_features + rows - 1) / rows;
  call.arena = workspace ? arena_at(workspace->data) : Arena{reinterpret_cast<char*>(uintptr_t(1) << 12), 0};
  using Shape = std::initializer_list<int64_t>;
  if (hadamard)
    call.signs = take_array(call.arena, queue, Shape{args.heads, 3 * args.blocks, rows});
  else
    call.normals = take_array(call.arena, queue, Shape{args.heads, args.blocks * args.dim, args.dim});
  call.lengths = take_array(call.arena, queue, Shape{args.heads, args.num_features, args.dim});
  args.normals = core::operand(call.normals), args.signs = core::operand(call.signs);
  args.lengths = core::operand(call.lengths), args.out = core::operand(out);
  return call;
}

int64_t kernel_bytes(const Queue& queue, const Call& call) {
  return core::workspace_bytes(kOp, queue, &Kernels::orthogonal_projection, call.args);
}

}  // namespace

void orthogonal_projection(const Queue& queue, Seed seed, ProjectionKind kind, Tensor out, Workspace workspace) {
  core::check_workspace(kOp, workspace, orthogonal_projection_workspace_bytes(queue, seed, kind, out));
  if (out.numel() == 0) return;
  const Call call = prepare(queue, kind, out, &workspace);
  if (call.signs.defined()) random_signs(queue, seed, philox::kProjectionSigns, call.signs);
  if (call.normals.defined()) random_normal(queue, seed, philox::kProjection, call.normals);
  random_normal(queue, seed, philox::kLengths, call.lengths);
  core::launch(kOp, queue, &Kernels::orthogonal_projection, call.args,
               {call.arena.base + call.arena.used, kernel_bytes(queue, call)});
}

int64_t orthogonal_projection_workspace_bytes(const Queue& queue, Seed, ProjectionKind kind, Tensor out) {
  const Call call = prepare(queue, kind, out, nullptr);
  const int64_t kernel = kernel_bytes(queue, call);
  return out.numel() == 0 ? 0 : with_alignment(call.arena) + kernel;
}

}  // namespace subquad
