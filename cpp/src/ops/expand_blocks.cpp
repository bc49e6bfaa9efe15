#include "subquad/expand_blocks.h"

#include "core/registry.h"
#include "ops/pattern_check.h"

namespace subquad {
namespace {

const char* const kCount = "expand_blocks_indptr";
const char* const kExpand = "expand_blocks";

ExpandBlocksArgs check(const char* op, const Queue& queue, const SparsePattern& pattern, int64_t num_keys,
                       const ConstTensor& indptr) {
  using core::kAny;
  const ConstTensor& bits = pattern.bits;
  core::check_array(op, "bits", queue, bits, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"ceil(K / 8)", kAny}},
                    {DType::u8});
  core::check_range(op, "num_keys", num_keys, 0, INT64_MAX);
  ExpandBlocksArgs args = {};
  args.batch = bits.shape[0], args.heads = bits.shape[1], args.seq_q = bits.shape[2], args.seq_k = num_keys;
  args.pattern = ops::check_pattern(op, queue, pattern, args.batch, args.heads, args.heads, args.seq_q, args.seq_k);
  core::check_array(op, "indptr", queue, indptr, {{"B H N + 1", args.batch * args.heads * args.seq_q + 1}},
                    {DType::i64});
  args.indptr = core::operand(indptr);
  return args;
}

/// Checks that the rows' places follow one another inside of `entries` entries.
void check_places(const ConstTensor& indptr, int64_t entries) {
  const int64_t* places = static_cast<const int64_t*>(indptr.data);
  const int64_t rows = indptr.shape[0] - 1;
  if (places[0] != 0) core::invalid(kExpand, "indptr", "0 as its first value", std::to_string(places[0]));
  for (int64_t r = 0; r < rows; ++r)
    if (places[r + 1] < places[r])
      core::invalid(kExpand, "indptr", "values that never fall",
                    std::to_string(places[r + 1]) + " after " + std::to_string(places[r]));
  if (entries < places[rows])
    core::invalid(kExpand, "indices",
                  "at least " + std::to_string(places[rows]) + " elements, the last value of indptr",
                  std::to_string(entries));
}

void launch(const char* op, const Queue& queue, Slot<ExpandBlocksArgs> Kernels::* slot, const ExpandBlocksArgs& args) {
  ops::check_pattern_values(op, queue, args.pattern, args.batch, args.heads, args.seq_q, args.seq_k);
  core::launch(op, queue, slot, args, {});
}

}  // namespace

void expand_blocks_indptr(const Queue& queue, const SparsePattern& pattern, int64_t num_keys, Tensor indptr) {
  const ExpandBlocksArgs args = check(kCount, queue, pattern, num_keys, indptr);
  core::check_output(kCount, "indptr", indptr, {&pattern.bits, &pattern.visible, &pattern.positions});
  launch(kCount, queue, &Kernels::expand_blocks_indptr, args);
}

void expand_blocks(const Queue& queue, const SparsePattern& pattern, int64_t num_keys, ConstTensor indptr,
                   Tensor indices) {
  ExpandBlocksArgs args = check(kExpand, queue, pattern, num_keys, indptr);
  core::check_array(kExpand, "indices", queue, indices, {{"nnz", core::kAny}}, {DType::i32});
  core::check_output(kExpand, "indices", indices, {&pattern.bits, &pattern.visible, &pattern.positions, &indptr});
  if (queue.device.type == DeviceType::cpu) check_places(indptr, indices.shape[0]);
  args.indices = core::operand(indices);
  launch(kExpand, queue, &Kernels::expand_blocks, args);
}

}  // namespace subquad
