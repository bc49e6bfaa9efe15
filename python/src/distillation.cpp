#include "call.h"
#include "keywords.h"
#include "subquad/attention_divergence.h"
#include "subquad/block_sum.h"
#include "subquad/expand_values.h"
#include "subquad/teacher_blocks.h"

namespace subquad::python {
namespace {

using nb::handle;

void expand(handle x_, handle visible_, handle positions_, handle y_) {
  Border border("expand_values");
  const ConstTensor x = border.in("x", x_), visible = border.in("visible", visible_);
  const ConstTensor positions = border.in("positions", positions_);
  const Tensor y = border.out("y", y_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  expand_values(queue, x, visible, positions, y);
}

void sum(handle y_, handle visible_, handle positions_, handle x_) {
  Border border("block_sum");
  const ConstTensor y = border.in("y", y_), visible = border.in("visible", visible_);
  const ConstTensor positions = border.in("positions", positions_);
  const Tensor x = border.out("x", x_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  block_sum(queue, y, visible, positions, x);
}

void teacher(handle q_, handle k_, const nb::dict& given, handle masses_, handle sum_squares_, handle sum_plogp_) {
  constexpr const char* op = "teacher_blocks";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_);
  const Keywords keywords(op, border, given);
  const double scale = keywords.scale();
  const ConstTensor visible = keywords.array("visible"), positions = keywords.array("positions");
  const Tensor masses = border.out("masses", masses_), squares = border.out("sum_squares", sum_squares_);
  const Tensor plogp = border.out("sum_plogp", sum_plogp_);
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] { return teacher_blocks_workspace_bytes(queue, q, k, scale, visible, positions, masses, squares, plogp); },
      [&](Workspace w) { teacher_blocks(queue, q, k, scale, visible, positions, masses, squares, plogp, w); });
}

AttentionDivergenceOptions divergence_options(const char* op, const Keywords& keywords) {
  AttentionDivergenceOptions o;
  o.scale = keywords.scale();
  o.scale_teacher = keywords.scale("scale_teacher");
  o.visible = keywords.array("visible"), o.positions = keywords.array("positions");
  return o;
}

void divergence(handle q_, handle k_, handle q_teacher_, handle k_teacher_, const nb::dict& given, handle kl_,
                handle sse_) {
  constexpr const char* op = "attention_divergence";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_);
  const ConstTensor qt = border.in("q_teacher", q_teacher_), kt = border.in("k_teacher", k_teacher_);
  const AttentionDivergenceOptions options = divergence_options(op, Keywords(op, border, given));
  const Tensor kl = border.out("kl", kl_), sse = border.out("sse", sse_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return attention_divergence_workspace_bytes(queue, q, k, qt, kt, options, kl, sse); },
      [&](Workspace w) { attention_divergence(queue, q, k, qt, kt, options, kl, sse, w); });
}

void divergence_bwd(handle dkl_, handle dsse_, handle q_, handle k_, handle q_teacher_, handle k_teacher_,
                    const nb::dict& given, handle dq_, handle dk_) {
  constexpr const char* op = "attention_divergence_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_);
  const ConstTensor dkl = border.in("dkl", dkl_), dsse = border.in("dsse", dsse_);
  const ConstTensor qt = border.in("q_teacher", q_teacher_), kt = border.in("k_teacher", k_teacher_);
  const AttentionDivergenceOptions options = divergence_options(op, Keywords(op, border, given));
  const Tensor dq = border.out("dq", dq_), dk = border.out("dk", dk_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return attention_divergence_bwd_workspace_bytes(queue, dkl, dsse, q, k, qt, kt, options, dq, dk); },
      [&](Workspace w) { attention_divergence_bwd(queue, dkl, dsse, q, k, qt, kt, options, dq, dk, w); });
}

}  // namespace

void bind_distillation(nb::module_& m) {
  define(m, "expand_values", &expand);
  define(m, "block_sum", &sum);
  define(m, "teacher_blocks", &teacher);
  define(m, "attention_divergence", &divergence);
  define(m, "attention_divergence_bwd", &divergence_bwd);
}

}  // namespace subquad::python
