#include "device/launch.cuh"
#include "l2_normalize.cuh"
#include "table.h"

namespace subquad::cuda {
namespace {

/// True if rows of the array can be read and written four elements at a time.
bool is_wide(const Operand& x, int64_t dim) {
  const int64_t bytes = dtype_bytes(x.dtype);
  bool aligned = dim % kQuad == 0 && reinterpret_cast<uintptr_t>(x.data) % uintptr_t(kQuad * bytes) == 0;
  for (int i = 0; i < 3; ++i) aligned &= x.stride[i] % kQuad == 0;
  return aligned;
}

using Kernel = void (*)(L2NormalizeArgs);

const char* launch_rows(const Queue& queue, const L2NormalizeArgs& args, Kernel kernel, int team) {
  const int64_t rows = args.batch * args.heads * args.seq, rows_a_block = kNormalizeThreads / team;
  const dim3 grid(unsigned((rows + rows_a_block - 1) / rows_a_block));
  return launch(queue, kernel, grid, dim3(kNormalizeThreads), 0, args);
}

const char* run_forward(const Queue& queue, const L2NormalizeArgs& args, void*) {
  const bool wide = is_wide(args.x, args.dim) && is_wide(args.y, args.dim);
  if (args.dim > 64)
    return launch_rows(queue, args, wide ? l2_normalize_kernel<32, true> : l2_normalize_kernel<32, false>, 32);
  return launch_rows(queue, args, wide ? l2_normalize_kernel<8, true> : l2_normalize_kernel<8, false>, 8);
}

const char* run_backward(const Queue& queue, const L2NormalizeArgs& args, void*) {
  const bool wide = is_wide(args.dy, args.dim) && is_wide(args.y, args.dim) && is_wide(args.dx, args.dim);
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
