#include "subquad/transpose_pattern.h"

#include <utility>

#include "core/registry.h"
#include "ops/pattern_check.h"

namespace subquad {
namespace {

const char* const kOp = "transpose_pattern";

TransposePatternArgs check(const Queue& queue, const SparsePattern& pattern, int64_t batch, int64_t heads,
                           int64_t seq_q, int64_t seq_k, const Tensor& key_indptr, const Tensor& rows,
                           const Tensor& order) {
  if (!pattern.indptr.defined()) core::mismatch(kOp, "pattern", "a CSR pattern", "no indptr");
  for (const auto& [name, extent] : {std::pair("batch", batch), {"heads", heads}, {"seq_q", seq_q}, {"seq_k", seq_k}})
    core::check_range(kOp, name, extent, 0, INT64_MAX);
  TransposePatternArgs args = {};
  args.batch = batch, args.heads = heads, args.seq_q = seq_q, args.seq_k = seq_k;
  args.pattern = ops::check_pattern(kOp, queue, pattern, batch, heads, heads, seq_q, seq_k);
  const int64_t entries = args.pattern.entries;
  core::check_array(kOp, "key_indptr", queue, key_indptr, {{"B H M + 1", batch * heads * seq_k + 1}}, {DType::i64});
  core::check_array(kOp, "rows", queue, rows, {{"nnz", entries}}, {DType::i32});
  core::check_array(kOp, "order", queue, order, {{"nnz", entries}}, {DType::i64});
  core::check_output(kOp, "key_indptr", key_indptr, {&pattern.indptr, &pattern.indices, &rows, &order});
  core::check_output(kOp, "rows", rows, {&pattern.indptr, &pattern.indices, &order});
  core::check_output(kOp, "order", order, {&pattern.indptr, &pattern.indices});
  args.key_indptr = core::operand(key_indptr), args.rows = core::operand(rows), args.order = core::operand(order);
  return args;
}

}  // namespace

void transpose_pattern(const Queue& queue, const SparsePattern& pattern, int64_t batch, int64_t heads, int64_t seq_q,
                       int64_t seq_k, Tensor key_indptr, Tensor rows, Tensor order, Workspace workspace) {
  const TransposePatternArgs args = check(queue, pattern, batch, heads, seq_q, seq_k, key_indptr, rows, order);
  ops::check_pattern_values(kOp, queue, args.pattern, batch, heads, seq_q, seq_k);
  core::launch(kOp, queue, &Kernels::transpose_pattern, args, workspace);
}

int64_t transpose_pattern_workspace_bytes(const Queue& queue, const SparsePattern& pattern, int64_t batch,
                                          int64_t heads, int64_t seq_q, int64_t seq_k, Tensor key_indptr, Tensor rows,
                                          Tensor order) {
  return core::workspace_bytes(kOp, queue, &Kernels::transpose_pattern,
                               check(queue, pattern, batch, heads, seq_q, seq_k, key_indptr, rows, order));
}

}  // namespace subquad
