#include "call.h"
#include "pattern.h"
#include "subquad/expand_blocks.h"
#include "subquad/select_blocks.h"
#include "subquad/sparse_attention.h"
#include "subquad/topk_select.h"
#include "subquad/transpose_pattern.h"
#include "subquad/visible_keys.h"

namespace subquad::python {
namespace {

using nb::handle;

void attention(handle q_, handle k_, handle v_, const nb::dict& pattern_, const nb::dict& given, handle out_,
               handle lse_) {
  constexpr const char* op = "sparse_attention";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const SparsePattern pattern = pattern_of(op, border, pattern_);
  const Keywords keywords(op, border, given);
  SparseAttentionOptions options;
  options.scale = keywords.scale();
  options.row_scale = keywords.array("row_scale");
  const Tensor out = border.out("out", out_), lse = optional_out(border, "lse", lse_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return sparse_attention_workspace_bytes(queue, q, k, v, pattern, options, out, lse); },
      [&](Workspace w) { sparse_attention(queue, q, k, v, pattern, options, out, lse, w); });
}

void attention_bwd(handle dout_, handle dlse_, handle q_, handle k_, handle v_, const nb::dict& pattern_,
                   const nb::dict& given, handle dq, handle dk, handle dv, handle drow_scale) {
  constexpr const char* op = "sparse_attention_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor dout = border.in("dout", dout_), dlse = border.in("dlse", dlse_);
  const SparsePattern pattern = pattern_of(op, border, pattern_);
  const Keywords keywords(op, border, given);
  SparseAttentionOptions options;
  options.scale = keywords.scale();
  options.row_scale = keywords.array("row_scale");
  options.max_entries = keywords.integer("max_entries");
  SparseAttentionGradients g;
  g.dq = border.out("dq", dq), g.dk = border.out("dk", dk), g.dv = border.out("dv", dv);
  g.drow_scale = optional_out(border, "drow_scale", drow_scale);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return sparse_attention_bwd_workspace_bytes(queue, dout, dlse, q, k, v, pattern, options, g); },
      [&](Workspace w) { sparse_attention_bwd(queue, dout, dlse, q, k, v, pattern, options, g, w); });
}

void count_blocks(const nb::dict& pattern_, int64_t num_keys, handle indptr_) {
  constexpr const char* op = "expand_blocks";
  Border border(op);
  const SparsePattern pattern = pattern_of(op, border, pattern_);
  const Tensor indptr = border.out("indptr", indptr_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  expand_blocks_indptr(queue, pattern, num_keys, indptr);
}

void expand(const nb::dict& pattern_, int64_t num_keys, handle indptr_, handle indices_) {
  constexpr const char* op = "expand_blocks";
  Border border(op);
  const SparsePattern pattern = pattern_of(op, border, pattern_);
  const ConstTensor indptr = border.in("indptr", indptr_);
  const Tensor indices = border.out("indices", indices_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  expand_blocks(queue, pattern, num_keys, indptr, indices);
}

void transpose(const nb::dict& pattern_, int64_t batch, int64_t heads, int64_t seq_q, int64_t seq_k, handle key_indptr_,
               handle rows_, handle order_) {
  constexpr const char* op = "transpose_pattern";
  Border border(op);
  const SparsePattern pattern = pattern_of(op, border, pattern_);
  const Tensor key_indptr = border.out("key_indptr", key_indptr_), rows = border.out("rows", rows_);
  const Tensor order = border.out("order", order_);
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] {
        return transpose_pattern_workspace_bytes(queue, pattern, batch, heads, seq_q, seq_k, key_indptr, rows, order);
      },
      [&](Workspace w) { transpose_pattern(queue, pattern, batch, heads, seq_q, seq_k, key_indptr, rows, order, w); });
}

void visible(const char* op, handle key_mask_, handle query_mask_, handle is_causal, int64_t num_keys, handle counts_,
             handle positions_) {
  Border border(op);
  const ConstTensor key_mask = border.in("key_mask", key_mask_), query_mask = border.in("query_mask", query_mask_);
  const bool causal = boolean(op, "is_causal", is_causal);
  const Tensor counts = border.out("counts", counts_), positions = optional_out(border, "positions", positions_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  visible_keys(queue, key_mask, query_mask, causal, num_keys, counts, positions);
}

void topk(handle scores_, const nb::dict& given, handle indices_) {
  constexpr const char* op = "topk_select";
  Border border(op);
  const ConstTensor scores = border.in("scores", scores_);
  const Keywords keywords(op, border, given);
  TopkSelectOptions options;
  options.k = keywords.integer("k");
  options.group = group_of(op, keywords.at("group"));
  options.key_mask = keywords.array("key_mask");
  options.is_causal = keywords.boolean("is_causal");
  const Tensor indices = border.out("out", indices_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return topk_select_workspace_bytes(queue, scores, options, indices); },
      [&](Workspace w) { topk_select(queue, scores, options, indices, w); });
}

void blocks(handle probs_, handle visible_, const nb::dict& given, handle bits_) {
  constexpr const char* op = "select_blocks";
  Border border(op);
  const ConstTensor probs = border.in("probs", probs_), visible = border.in("visible", visible_);
  const SelectBlocksOptions options = select_options(op, Keywords(op, border, given));
  const Tensor bits = border.out("bits", bits_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return select_blocks_workspace_bytes(queue, probs, visible, options, bits); },
      [&](Workspace w) { select_blocks(queue, probs, visible, options, bits, w); });
}

}  // namespace

void bind_sparse(nb::module_& m) {
  define(m, "sparse_attention", &attention);
  define(m, "sparse_attention_bwd", &attention_bwd);
  define(m, "expand_blocks_indptr", &count_blocks);
  define(m, "expand_blocks", &expand);
  define(m, "transpose_pattern", &transpose);
  define(m, "visible_keys", &visible);
  define(m, "topk_select", &topk);
  define(m, "select_blocks", &blocks);
}

}  // namespace subquad::python
