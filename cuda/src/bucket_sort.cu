#include "bucket_sort.cuh"
#include "device/launch.cuh"
#include "table.h"

namespace subquad::cuda {
namespace {

SortPlan plan_of(const BucketSortArgs& args) {
  return plan_sort(args.batch * args.heads * args.num_hashes, args.seq, args.num_buckets);
}

void* lay_out(Arena& arena, const BucketSortArgs& args) { return take<char>(arena, sort_scratch_bytes(plan_of(args))); }

const char* run(const Queue& queue, const BucketSortArgs& args, void* workspace) {
  CodeSort sort = {};
  sort.plan = plan_of(args);
  sort.heads = args.heads, sort.num_hashes = args.num_hashes;
  sort.num_buckets = sort.entries = int32_t(args.num_buckets);
  sort.codes = args.codes, sort.mask = args.mask;
  sort.order = args.order, sort.offsets = args.offsets;
  sort.lists_hidden = true;
  Arena arena = arena_at(workspace);
  sort.scratch = lay_out(arena, args);
  return sort_codes(queue, sort);
}

const char* supports(const BucketSortArgs& args) {
  if (args.seq > INT32_MAX) return kTooManyTokens;
  return args.batch * args.heads * args.num_hashes > kMostSortRows ? "more than 2^31 - 1 rows of codes" : nullptr;
}

int64_t workspace_bytes(const Queue&, const BucketSortArgs& args) {
  Arena arena = {};
  lay_out(arena, args);
  return with_alignment(arena);
}

}  // namespace

const Slot<BucketSortArgs> bucket_sort_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cuda
