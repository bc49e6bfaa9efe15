#include "call.h"
#include "keywords.h"
#include "subquad/merge_states.h"
#include "subquad/row_dot.h"
#include "subquad/segment_mean.h"
#include "subquad/softmax_attention.h"
#include "subquad/softmax_sample.h"
#include "subquad/sum_arrays.h"

namespace subquad::python {
namespace {

using nb::handle;

SoftmaxAttentionOptions attention_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  SoftmaxAttentionOptions o;
  o.scale = keywords.scale();
  o.key_bias = keywords.array("key_bias");
  o.key_mask = keywords.array("key_mask");
  o.is_causal = keywords.boolean("is_causal");
  const handle window = keywords.at("window");
  if (window.is_none()) return o;
  const bool is_pair = nb::isinstance<nb::tuple>(window) || nb::isinstance<nb::list>(window);
  if (!is_pair || nb::len(window) != 2)
    throw TypeMismatch(sentence(op, "window", "None or a pair (left, right)", kind_of(window)));
  o.window_left = integer(op, "window", window[0]);
  o.window_right = integer(op, "window", window[1]);
  return o;
}

void attention(handle q_, handle k_, handle v_, const nb::dict& keywords, handle out_, handle lse_) {
  constexpr const char* op = "softmax_attention";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const SoftmaxAttentionOptions options = attention_options(op, border, keywords);
  const Tensor out = border.out("out", out_), lse = optional_out(border, "lse", lse_);
  same_dtype(op, {{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return softmax_attention_workspace_bytes(queue, q, k, v, options, out, lse); },
      [&](Workspace w) { softmax_attention(queue, q, k, v, options, out, lse, w); });
}

void attention_bwd(handle dout_, handle dlse_, handle q_, handle k_, handle v_, const nb::dict& keywords, handle out_,
                   handle lse_, handle dq, handle dk, handle dv, handle dkey_bias) {
  constexpr const char* op = "softmax_attention_bwd";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const ConstTensor dout = border.in("dout", dout_), dlse = border.in("dlse", dlse_);
  const SoftmaxAttentionOptions options = attention_options(op, border, keywords);
  const ConstTensor out = border.in("out", out_), lse = border.in("lse", lse_);
  same_dtype(op, {{"q", &q}, {"k", &k}, {"v", &v}, {"dout", &dout}, {"out", &out}});
  const SoftmaxAttentionGradients gradients = {border.out("dq", dq), border.out("dk", dk), border.out("dv", dv),
                                               optional_out(border, "dkey_bias", dkey_bias), Tensor{}};
  const Queue queue = border.queue();
  run_with_workspace(
      border,
      [&] { return softmax_attention_bwd_workspace_bytes(queue, dout, dlse, q, k, v, options, out, lse, gradients); },
      [&](Workspace w) { softmax_attention_bwd(queue, dout, dlse, q, k, v, options, out, lse, gradients, w); });
}

void merge(handle out1_, handle lse1_, handle out2_, handle lse2_, handle out_, handle lse_) {
  Border border("merge_states");
  const ConstTensor out1 = border.in("out1", out1_), lse1 = border.in("lse1", lse1_);
  const ConstTensor out2 = border.in("out2", out2_), lse2 = border.in("lse2", lse2_);
  const Tensor out = border.out("out", out_), lse = border.out("lse", lse_);
  same_dtype("merge_states", {{"out1", &out1}, {"out2", &out2}});
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  merge_states(queue, out1, lse1, out2, lse2, out, lse);
}

void merge_bwd(handle dout_, handle dlse_, handle out1_, handle lse1_, handle out2_, handle lse2_, handle dout1_,
               handle dlse1_, handle dout2_, handle dlse2_) {
  Border border("merge_states_bwd");
  const ConstTensor dout = border.in("dout", dout_), dlse = border.in("dlse", dlse_);
  const ConstTensor out1 = border.in("out1", out1_), lse1 = border.in("lse1", lse1_);
  const ConstTensor out2 = border.in("out2", out2_), lse2 = border.in("lse2", lse2_);
  const Tensor dout1 = border.out("dout1", dout1_), dlse1 = border.out("dlse1", dlse1_);
  const Tensor dout2 = border.out("dout2", dout2_), dlse2 = border.out("dlse2", dlse2_);
  same_dtype("merge_states_bwd", {{"out1", &out1}, {"out2", &out2}, {"dout", &dout}});
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  merge_states_bwd(queue, dout, dlse, out1, lse1, out2, lse2, dout1, dlse1, dout2, dlse2);
}

void sum(const nb::list& arrays, const nb::list& factors, handle out_) {
  Border border("sum_arrays");
  SumTerm t[4];
  for (size_t i = 0; i < arrays.size(); ++i)
    t[i] = {border.in("terms", arrays[i]), number("sum_arrays", "factors", factors[i])};
  const Tensor out = border.out("out", out_);
  const Queue queue = border.queue();
  const size_t count = arrays.size();
  nb::gil_scoped_release unlocked;
  if (count == 1) sum_arrays(queue, {t[0]}, out);
  if (count == 2) sum_arrays(queue, {t[0], t[1]}, out);
  if (count == 3) sum_arrays(queue, {t[0], t[1], t[2]}, out);
  if (count == 4) sum_arrays(queue, {t[0], t[1], t[2], t[3]}, out);
}

void dot(handle x_, handle y_, handle z_, handle out_) {
  Border border("row_dot");
  const ConstTensor x = border.in("x", x_), y = border.in("y", y_), z = border.in("z", z_);
  const Tensor out = border.out("out", out_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  row_dot(queue, x, y, z, out);
}

SegmentMeanOptions segment_options(const char* op, Border& border, const nb::dict& given) {
  const Keywords keywords(op, border, given);
  SegmentMeanOptions o;
  o.num_segments = keywords.integer("num_segments");
  o.segment_size = keywords.integer("segment_size");
  o.mask = keywords.array("mask");
  o.paired_mask = keywords.array("paired_mask");
  return o;
}

void mean(handle x_, const nb::dict& keywords, handle out_, handle counts_) {
  Border border("segment_mean");
  const ConstTensor x = border.in("x", x_);
  const SegmentMeanOptions options = segment_options("segment_mean", border, keywords);
  const Tensor out = border.out("out", out_), counts = optional_out(border, "counts", counts_);
  same_dtype("segment_mean", {{"x", &x}, {"out", &out}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return segment_mean_workspace_bytes(queue, x, options, out, counts); },
      [&](Workspace w) { segment_mean(queue, x, options, out, counts, w); });
}

void mean_bwd(handle dout_, handle base_, const nb::dict& keywords, handle dx_) {
  Border border("segment_mean_bwd");
  const ConstTensor dout = border.in("dout", dout_), base = border.in("base", base_);
  const SegmentMeanOptions options = segment_options("segment_mean_bwd", border, keywords);
  const Tensor dx = border.out("dx", dx_);
  same_dtype("segment_mean_bwd", {{"dout", &dout}, {"base", &base}, {"dx", &dx}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return segment_mean_bwd_workspace_bytes(queue, dout, base, options, dx); },
      [&](Workspace w) { segment_mean_bwd(queue, dout, base, options, dx, w); });
}

void sample(handle q_, handle k_, const nb::dict& given, handle indices_) {
  constexpr const char* op = "softmax_sample";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_);
  const Keywords keywords(op, border, given);
  SoftmaxSampleOptions options;
  options.scale = keywords.scale();
  options.num_samples = keywords.integer("num_samples");
  options.key_mask = keywords.array("key_mask");
  options.seed = keywords.seed();
  const Tensor indices = border.out("indices", indices_);
  same_dtype(op, {{"q", &q}, {"k", &k}});
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return softmax_sample_workspace_bytes(queue, q, k, options, indices); },
      [&](Workspace w) { softmax_sample(queue, q, k, options, indices, w); });
}

}  // namespace

void bind_softmax(nb::module_& m) {
  define(m, "softmax_attention", &attention);
  define(m, "softmax_attention_bwd", &attention_bwd);
  define(m, "merge_states", &merge);
  define(m, "merge_states_bwd", &merge_bwd);
  define(m, "sum_arrays", &sum);
  define(m, "row_dot", &dot);
  define(m, "segment_mean", &mean);
  define(m, "segment_mean_bwd", &mean_bwd);
  define(m, "softmax_sample", &sample);
}

}  // namespace subquad::python
