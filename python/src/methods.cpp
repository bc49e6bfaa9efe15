#include "call.h"
#include "subquad/yoso_attention.h"
#include "values.h"

namespace subquad::python {
namespace {

using nb::handle;

/// The keywords of yoso_attention, as a dict: both passes take the same ones.
YosoOptions yoso_options(const char* op, Border& border, const nb::dict& keywords) {
  const auto at = [&](const char* name) { return handle(keywords[name]); };
  YosoOptions o;
  o.num_hashes = integer(op, "num_hashes", at("num_hashes"));
  o.hash_bits = integer(op, "hash_bits", at("hash_bits"));
  o.hashing =
      choice<Hashing>(op, "hashing", at("hashing"), {{"hadamard", Hashing::hadamard}, {"gaussian", Hashing::gaussian}});
  o.carving =
      choice<Carving>(op, "carving", at("carving"), {{"strided", Carving::strided}, {"published", Carving::published}});
  o.expectation = boolean(op, "expectation", at("expectation"));
  o.is_causal = boolean(op, "is_causal", at("is_causal"));
  o.normalize = boolean(op, "normalize", at("normalize"));
  o.seed = border.seed(at("seed"));
  if (!at("grad").is_none())
    o.gradient = choice<YosoGradient>(op, "grad", at("grad"),
                                      {{"sampled", YosoGradient::sampled},
                                       {"sampled_exact", YosoGradient::sampled_exact},
                                       {"lower_bound", YosoGradient::lower_bound},
                                       {"exact", YosoGradient::exact}});
  o.planes = border.in("planes", at("planes"));
  o.signs = border.in("signs", at("signs"));
  o.key_mask = border.in("key_mask", at("key_mask"));
  o.query_mask = border.in("query_mask", at("query_mask"));
  return o;
}

void yoso(handle q_, handle k_, handle v_, const nb::dict& keywords, handle out_, handle lse_) {
  Border border("yoso_attention");
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const YosoOptions options = yoso_options("yoso_attention", border, keywords);
  const Tensor out = border.out("out", out_), lse = optional_out(border, "lse", lse_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return yoso_attention_workspace_bytes(queue, q, k, v, options, out, lse); },
      [&](Workspace w) { yoso_attention(queue, q, k, v, options, out, lse, w); });
}

void yoso_bwd(handle dout_, handle q_, handle k_, handle v_, const nb::dict& keywords, handle out_, handle lse_,
              handle dq_, handle dk_, handle dv_) {
  Border border("yoso_attention_bwd");
  const ConstTensor dout = border.in("dout", dout_), q = border.in("q", q_), k = border.in("k", k_),
                    v = border.in("v", v_);
  const YosoOptions options = yoso_options("yoso_attention_bwd", border, keywords);
  const ConstTensor out = border.in("out", out_), lse = border.in("lse", lse_);
  const Tensor dq = border.out("dq", dq_), dk = border.out("dk", dk_), dv = border.out("dv", dv_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return yoso_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, out, lse, dq, dk, dv); },
      [&](Workspace w) { yoso_attention_bwd(queue, dout, q, k, v, options, out, lse, dq, dk, dv, w); });
}

}  // namespace

void bind_methods(nb::module_& m) {
  define(m, "yoso_attention", &yoso);
  define(m, "yoso_attention_bwd", &yoso_bwd);
}

}  // namespace subquad::python
