#include "subquad/sum_arrays.h"

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kOp = "sum_arrays";

bool same_view(const ConstTensor& a, const ConstTensor& b) {
  bool same = a.data == b.data && a.dtype == b.dtype;
  for (int i = 0; i < 4; ++i) same &= a.shape[i] == b.shape[i] && (a.stride[i] == b.stride[i] || a.shape[i] == 1);
  return same;
}

SumArraysTerm check_term(const Queue& queue, const std::string& name, const SumTerm& term, const Tensor& out) {
  const ConstTensor& x = term.array;
  const int64_t batch = out.shape[0], heads = out.shape[1];
  core::check_array(
      kOp, name.c_str(), queue, x,
      {{"B_i", batch == 1 ? core::kAny : batch}, {"H_i", core::kAny}, {"N", out.shape[2]}, {"D", out.shape[3]}},
      {DType::f32, DType::f16, DType::bf16});
  if (heads == 0 ? x.shape[1] != 0 : x.shape[1] % heads != 0)
    core::invalid(kOp, name.c_str(), "a multiple of the " + std::to_string(heads) + " heads of out",
                  std::to_string(x.shape[1]));
  const ConstTensor none;
  core::check_output(kOp, "out", out, {same_view(x, out) ? &none : &x});
  return {core::operand(x), batch == 1 ? x.shape[0] : 1, heads == 0 ? 0 : x.shape[1] / heads, float(term.factor)};
}

}  // namespace

void sum_arrays(const Queue& queue, std::initializer_list<SumTerm> terms, Tensor out) {
  using core::kAny;
  core::check_array(kOp, "out", queue, out, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  if (terms.size() < 1 || terms.size() > 4) core::invalid(kOp, "terms", "1 to 4 arrays", std::to_string(terms.size()));
  SumArraysArgs args = {};
  args.batch = out.shape[0], args.heads = out.shape[1], args.seq = out.shape[2], args.dim = out.shape[3];
  for (const SumTerm& term : terms) {
    const std::string name = "terms[" + std::to_string(args.num_terms) + "]";
    args.terms[args.num_terms++] = check_term(queue, name, term, out);
  }
  args.out = core::operand(out);
  if (out.numel() > 0) core::launch(kOp, queue, &Kernels::sum_arrays, args, Workspace());
}

}  // namespace subquad
