#include "subquad/bucket_sort.h"

#include "core/registry.h"
#include "ops/codes_check.h"

namespace subquad {
namespace {

const char* const kOp = "bucket_sort";

BucketSortArgs check(const Queue& queue, const ConstTensor& codes, int64_t num_buckets, const ConstTensor& mask,
                     const Tensor& order, const Tensor& offsets) {
  using core::kAny;
  core::check_array(kOp, "codes", queue, codes, {{"B", kAny}, {"H", kAny}, {"R", kAny}, {"N", kAny}},
                    {DType::u16, DType::i32});
  const int64_t batch = codes.shape[0], heads = codes.shape[1], num_hashes = codes.shape[2], seq = codes.shape[3];
  core::check_range(kOp, "num_buckets", num_buckets, 1, int64_t(1) << 24);
  if (mask.defined()) core::check_array(kOp, "mask", queue, mask, {{"B", batch}, {"N", seq}}, {DType::boolean});
  core::check_array(kOp, "order", queue, order, {{"B", batch}, {"H", heads}, {"R", num_hashes}, {"N", seq}},
                    {DType::i32});
  core::check_array(kOp, "offsets", queue, offsets,
                    {{"B", batch}, {"H", heads}, {"R", num_hashes}, {"num_buckets + 1", num_buckets + 1}},
                    {DType::i32});
  core::check_output(kOp, "order", order, {&codes, &mask});
  core::check_output(kOp, "offsets", offsets, {&codes, &mask, &order});
  BucketSortArgs args = {};
  args.batch = batch, args.heads = heads, args.num_hashes = num_hashes, args.seq = seq;
  args.num_buckets = num_buckets;
  args.codes = core::operand(codes);
  args.mask = core::operand(mask);
  args.order = core::operand(order);
  args.offsets = core::operand(offsets);
  return args;
}

bool empty(const BucketSortArgs& args) { return args.batch == 0 || args.heads == 0 || args.num_hashes == 0; }

}  // namespace

void bucket_sort(const Queue& queue, ConstTensor codes, int64_t num_buckets, ConstTensor mask, Tensor order,
                 Tensor offsets, Workspace workspace) {
  const BucketSortArgs args = check(queue, codes, num_buckets, mask, order, offsets);
  ops::check_codes(kOp, "codes", queue, codes, num_buckets);
  if (!empty(args)) core::launch(kOp, queue, &Kernels::bucket_sort, args, workspace);
}

int64_t bucket_sort_workspace_bytes(const Queue& queue, ConstTensor codes, int64_t num_buckets, ConstTensor mask,
                                    Tensor order, Tensor offsets) {
  const BucketSortArgs args = check(queue, codes, num_buckets, mask, order, offsets);
  return empty(args) ? 0 : core::workspace_bytes(kOp, queue, &Kernels::bucket_sort, args);
}

}  // namespace subquad
