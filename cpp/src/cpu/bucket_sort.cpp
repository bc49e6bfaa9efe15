#include "core/parallel.h"
#include "cpu/bucket_index.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

template <class Code>
void sort_row(const BucketSortArgs& args, const Code* codes, const uint8_t* mask, int32_t* order, int32_t* offsets) {
  counting_pass(codes, mask, nullptr, args.seq, args.num_buckets, [](Code code) { return code; }, offsets, order);
  if (!mask) return;
  int32_t* masked = order + offsets[args.num_buckets];
  for (int64_t n = 0; n < args.seq; ++n)
    if (!mask[n]) *masked++ = int32_t(n);
}

const char* run(const Queue& queue, const BucketSortArgs& args, void*) {
  const auto at = [](const Operand& x, int64_t b, int64_t h, int64_t r) {
    return b * x.stride[0] + h * x.stride[1] + r * x.stride[2];
  };
  core::parallel_for(queue, args.batch * args.heads * args.num_hashes, [&](int64_t row, int) {
    const int64_t r = row % args.num_hashes, h = row / args.num_hashes % args.heads;
    const int64_t b = row / args.num_hashes / args.heads;
    const uint8_t* mask = static_cast<const uint8_t*>(args.mask.data);
    if (mask) mask += b * args.mask.stride[0];
    int32_t* order = static_cast<int32_t*>(args.order.data) + at(args.order, b, h, r);
    int32_t* offsets = static_cast<int32_t*>(args.offsets.data) + at(args.offsets, b, h, r);
    const int64_t codes = at(args.codes, b, h, r);
    if (args.codes.dtype == DType::u16)
      sort_row(args, static_cast<const uint16_t*>(args.codes.data) + codes, mask, order, offsets);
    else
      sort_row(args, static_cast<const int32_t*>(args.codes.data) + codes, mask, order, offsets);
  });
  return nullptr;
}

const char* supports(const BucketSortArgs& args) {
  return args.seq > INT32_MAX ? "more than 2^31 - 1 tokens" : nullptr;
}

int64_t workspace_bytes(const Queue&, const BucketSortArgs&) { return 0; }

}  // namespace

const Slot<BucketSortArgs> bucket_sort_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
