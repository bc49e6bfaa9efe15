#include "bucket_attention.cuh"
#include "bucket_build.cuh"
#include "bucket_gather.cuh"
#include "core/visit.h"
#include "device/arithmetic.cuh"
#include "device/launch.cuh"

namespace subquad::cuda {
namespace {

// Memory for tables, enough for blocks on all multiprocessors. More exist at the same time only if those of one (batch,
// kv head) are larger.
constexpr int64_t kTableBytes = int64_t(128) << 20;
constexpr int64_t kMultiprocessors = 132;

int64_t slices_of(const BucketProblem& p) { return ceil_div(p.dim, kSlice); }

/// Blocks for all hashes and `columns` at a time.
int64_t build_blocks(const TablesArgs& args, int64_t columns) {
  const BucketProblem& p = args.problem;
  return args.pairs * ceil_div(p.num_hashes, args.hashes) * args.group_blocks * ceil_div(p.dim, columns);
}

template <int Columns, class T>
const char* build(const Queue& queue, const TablesArgs& args) {
  // Every thread stages up to kStagedCodes codes, so few groups need some threads more.
  const int owners = args.hashes * args.groups * kWarp, stagers = args.hashes * kBuildTile<T> / kStagedCodes;
  return launch(queue, build_tables_kernel<Columns, T>, dim3(unsigned(build_blocks(args, Columns))),
                dim3(unsigned(owners > stagers ? owners : stagers)),
                size_t(build_shared_bytes<Columns, T>(args.hashes, args.groups)), args);
}

const char* run_build(const Queue& queue, TablesArgs args) {
  const BucketProblem& p = args.problem;
  const int64_t groups = ceil_div(p.num_buckets, kOwnBuckets);
  args.group_blocks = ceil_div(groups, kBuildWarps);
  args.groups = int(ceil_div(groups, args.group_blocks));
  args.vectors = has_aligned_rows(p.rows, 16);
  // Blocks of more hashes and columns read codes and rows less often, but enough blocks for all multiprocessors come
  // first.
  for (args.hashes = kBuildHashes; args.hashes > 1; --args.hashes)
    if (args.hashes * args.groups <= kBuildWarps && build_blocks(args, 64) >= 2 * kMultiprocessors) break;
  args.hashes = int(ceil_div(p.num_hashes, ceil_div(p.num_hashes, args.hashes)));
  const bool wide = p.dim > kSlice && build_blocks(args, 64) >= kMultiprocessors;
  const char* status = nullptr;
  visit_float(p.rows.dtype, [&](auto tag) {
    using T = decltype(tag);
    status = wide ? build<64, T>(queue, args) : build<32, T>(queue, args);
  });
  return status;
}

/// Time of a gathering in cycles for every hash: of shared memory, a wavefront for every row copied or added, or of L2,
/// which gives a multiprocessor 24 bytes a cycle.
int64_t gather_cost(const TablesArgs& args, int64_t targets, int chunks) {
  const int64_t blocks = args.pairs * args.slices * ceil_div(targets, chunks * kGatherTargets);
  const int64_t rows = args.problem.num_buckets, shared = rows + chunks * kGatherTargets;
  const int64_t l2 = rows * kSlice * int64_t(sizeof(float)) / 24;
  return ceil_div(blocks, kMultiprocessors) * (shared > l2 ? shared : l2);
}

const char* run_gather(const Queue& queue, TablesArgs args) {
  const BucketProblem& p = args.problem;
  const int64_t targets = p.targets.group * p.targets.tokens;
  const int64_t most_shared = most_shared_bytes(queue);
  const bool direct =
      p.num_buckets > kMostStagedBuckets || targets <= p.num_buckets || gather_shared_bytes(p, 1, false) > most_shared;
  args.chunks = 1;
  for (int chunks = 2; !direct && chunks <= kGatherChunks; ++chunks)
    if (gather_shared_bytes(p, chunks, false) <= most_shared &&
        gather_cost(args, targets, chunks) < gather_cost(args, targets, args.chunks))
      args.chunks = chunks;
  args.tiles = ceil_div(targets, args.chunks * kGatherTargets);
  args.vectors = has_aligned_rows(p.out, 4 * dtype_bytes(p.out.dtype));
  const char* status = nullptr;
  visit_float(p.out.dtype, [&](auto tag) {
    using Out = decltype(tag);
    const auto kernel = direct ? gather_tables_kernel<true, Out> : gather_tables_kernel<false, Out>;
    status = launch(queue, kernel, dim3(unsigned(args.pairs * args.slices * args.tiles)), dim3(kGatherThreads),
                    size_t(gather_shared_bytes(p, args.chunks, direct)), args);
  });
  return status;
}

}  // namespace

Tables take_tables(Arena& arena, const BucketProblem& p) {
  const int64_t floats = p.num_hashes * slices_of(p) * piece_floats(p), pairs = p.batch * p.heads_kv;
  const int64_t fit = floats ? kTableBytes / (floats * int64_t(sizeof(float))) : pairs;
  // Equal parts.
  const int64_t parts = ceil_div(pairs, fit < 1 ? 1 : fit), once = parts ? ceil_div(pairs, parts) : 0;
  return {take<float>(arena, once * floats), once};
}

const char* run_tables(const Queue& queue, const BucketProblem& problem, const Tables& tables) {
  TablesArgs args = {};
  args.problem = problem, args.tables = tables.data, args.slices = slices_of(problem);
  const int64_t pairs = problem.batch * problem.heads_kv;
  const char* status = nullptr;
  if (problem.targets.group * problem.targets.tokens == 0) return status;
  for (; args.first_pair < pairs && !status; args.first_pair += tables.pairs_once) {
    const int64_t left = pairs - args.first_pair;
    args.pairs = left < tables.pairs_once ? left : tables.pairs_once;
    if (problem.num_hashes > 0) status = run_build(queue, args);
    if (!status) status = run_gather(queue, args);
  }
  return status;
}

}  // namespace subquad::cuda
