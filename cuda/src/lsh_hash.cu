#include "core/visit.h"
#include "device/launch.cuh"
#include "lsh_hash_carving.cuh"
#include "lsh_hash_planes.cuh"
#include "table.h"

namespace subquad::cuda {
namespace {

/// Starts blocks of `threads` threads for all tiles; a launch takes as many as a grid can have.
template <class... P, class... A>
const char* launch_tiles(const Queue& queue, void (*kernel)(P...), const LshHashArgs& args, int tokens, int threads,
                         size_t shared_bytes, const A&... rest) {
  const int64_t tiles = args.batch * args.heads * ceil_div(args.seq, tokens), most = 0x7fffffff;
  const char* status = nullptr;
  for (int64_t before = 0; before < tiles && !status; before += most) {
    const int64_t blocks = tiles - before < most ? tiles - before : most;
    status =
        launch(queue, kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes, args, rest..., before);
  }
  return status;
}

template <int kCount, int kSplit, class T>
const char* launch_hadamard(const Queue& queue, const LshHashArgs& args) {
  using Shape = HadamardShape<kCount, kSplit>;
  const int capacity = Shape::capacity(args.parts, most_shared_bytes(queue));
  // More transforms than a group holds are not woven.
  const BitSpread spread = spread_bits(args.parts == capacity ? capacity : 1);
  return launch_tiles(queue, hadamard_kernel<kCount, kSplit, T>, args, Shape::kTokens, kHadamardThreads,
                      Shape::shared_bytes(capacity), spread, capacity);
}

/// Few enough tokens that their rows and a chunk of planes leave room for a second block where the device has much
/// shared memory, and for one where it has less; and not many more than exist.
template <class T>
int plane_tokens(const Queue& queue, const LshHashArgs& args) {
  const int64_t width = args.dim * kRowParts<T>;
  const int most = width <= 128 ? kMaxPlaneTokens : width <= 256 ? kMaxPlaneTokens / 2 : kWarpTokens;
  int tokens = kWarpTokens;
  const int64_t most_shared = most_shared_bytes(queue);
  while (tokens < most && tokens < args.seq &&
         int64_t(plane_shared_bytes(2 * tokens, args.dim, kRowParts<T>)) <= most_shared)
    tokens *= 2;
  return tokens;
}

template <class T>
const char* launch_planes(const Queue& queue, const LshHashArgs& args) {
  const int tokens = plane_tokens<T>(queue, args);
  return launch_tiles(queue, planes_kernel<T>, args, tokens, tokens,
                      plane_shared_bytes(tokens, args.dim, kRowParts<T>));
}

const char* supports(const LshHashArgs& args) { return args.dim > kMaxHeadDim ? kTooWide : nullptr; }

int64_t workspace_bytes(const Queue&, const LshHashArgs&) { return 0; }

const char* run(const Queue& queue, const LshHashArgs& args, void*) {
  const char* status = nullptr;
  visit_float(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (!args.hadamard)
      status = launch_planes<T>(queue, args);
    else if (args.padded == 64)
      status = launch_hadamard<64, 1, T>(queue, args);
    else if (args.padded == 128)
      status = launch_hadamard<128, 1, T>(queue, args);
    else
      status = launch_hadamard<128, 2, T>(queue, args);
  });
  return status;
}

}  // namespace

const Slot<LshHashArgs> lsh_hash_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cuda
