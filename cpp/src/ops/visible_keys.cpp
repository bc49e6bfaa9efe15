#include "subquad/visible_keys.h"

#include "core/registry.h"

namespace subquad {

void visible_keys(const Queue& queue, ConstTensor key_mask, ConstTensor query_mask, bool is_causal, int64_t num_keys,
                  Tensor counts, Tensor positions) {
  const char* const op = "visible_keys";
  core::check_range(op, "num_keys", num_keys, 0, INT32_MAX);
  core::check_array(op, "counts", queue, counts, {{"B", core::kAny}, {"N", core::kAny}}, {DType::i32});
  const int64_t batch = counts.shape[0], seq_q = counts.shape[1];
  if (key_mask.defined())
    core::check_array(op, "key_mask", queue, key_mask, {{"B", batch}, {"M", num_keys}}, {DType::boolean});
  if (query_mask.defined())
    core::check_array(op, "query_mask", queue, query_mask, {{"B", batch}, {"N", seq_q}}, {DType::boolean});
  if (positions.defined())
    core::check_array(op, "positions", queue, positions, {{"B", batch}, {"M", num_keys}}, {DType::i32});
  core::check_output(op, "counts", counts, {&key_mask, &query_mask, &positions});
  core::check_output(op, "positions", positions, {&key_mask, &query_mask, &counts});

  VisibleKeysArgs args = {};
  args.batch = batch, args.seq_q = seq_q, args.seq_k = num_keys, args.is_causal = is_causal;
  args.key_mask = core::operand(key_mask), args.query_mask = core::operand(query_mask);
  args.counts = core::operand(counts), args.positions = core::operand(positions);
  if (batch > 0) core::launch(op, queue, &Kernels::visible_keys, args, Workspace());
}

}  // namespace subquad
