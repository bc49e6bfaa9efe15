#include "device/launch.cuh"
#include "l2_normalize.cuh"
#include "table.h"

namespace subquad::cuda {
namespace {

using Kernel = void (*)(L2NormalizeArgs);

const char* launch_rows(const Queue& queue, const L2NormalizeArgs& args, Kernel kernel, int team) {
  const dim3 grid(unsigned(ceil_div(args.batch * args.heads * args.seq, kNormalizeThreads / team)));
  return launch(queue, kernel, grid, dim3(kNormalizeThreads), 0, args);
}

const char* run_forward(const Queue& queue, const L2NormalizeArgs& args, void*) {
  const bool wide = allows_quads(args.x, args.dim) && allows_quads(args.y, args.dim);
  if (args.dim > 64)
    return launch_rows(queue, args, wide ? l2_normalize_kernel<32, true> : l2_normalize_kernel<32, false>, 32);
  return launch_rows(queue, args, wide ? l2_normalize_kernel<8, true> : l2_normalize_kernel<8, false>, 8);
}

const char* run_backward(const Queue& queue, const L2NormalizeArgs& args, void*) {
  const bool wide =
      allows_quads(args.dy, args.dim) && allows_quads(args.y, args.dim) && allows_quads(args.dx, args.dim);
  if (args.dim > 64)
    return launch_rows(queue, args, wide ? l2_normalize_bwd_kernel<32, true> : l2_normalize_bwd_kernel<32, false>, 32);
  return launch_rows(queue, args, wide ? l2_normalize_bwd_kernel<8, true> : l2_normalize_bwd_kernel<8, false>, 8);
}

const char* supports(const L2NormalizeArgs& args) { return args.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue&, const L2NormalizeArgs&) { return 0; }

}  // namespace

const Slot<L2NormalizeArgs> l2_normalize_slot = {supports, workspace_bytes, run_forward};
const Slot<L2NormalizeArgs> l2_normalize_bwd_slot = {supports, workspace_bytes, run_backward};

}  // namespace subquad::cuda
