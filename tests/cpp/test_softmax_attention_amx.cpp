// The AMX kernel of softmax_attention on emulated tile registers, against the equations in double.
#include <array>

#include "softmax_attention_reference.h"

#if defined(__x86_64__)
#include "amx_emulation.h"
#define SUBQUAD_ISA x86_64_amx_emulated
#include "cpu/amx/softmax_attention.cpp"

using namespace softmax;

namespace {

constexpr DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;

void launch(const SoftmaxAttentionArgs& args, int threads) {
  const Slot<SoftmaxAttentionArgs>& slot = cpu::SUBQUAD_ISA::softmax_attention_slot;
  const Queue queue = Queue::cpu(threads);
  std::vector<char> workspace(size_t(slot.workspace_bytes(queue, args)), char(0xff));
  CHECK(slot.supports(args) == nullptr);
  CHECK(slot.run(queue, args, workspace.data()) == nullptr);
}

void run_emulated(Problem& p, int threads = 2) { launch(p.args(), threads); }

/// Finite values become their magnitudes. They then add up to the sum of their magnitudes, so that bounds on the
/// rounding of weights, values and outputs are a bound on the relative error.
void make_values_positive(Problem& p) {
  for (Sweep& w : p.sweeps)
    for (int64_t i = 0; i < w.v.size(); ++i) w.v.set(i, std::fabs(w.v.values[size_t(i)]));
}

bool is_f32(const Array& x) { return x.view.dtype == f32; }

/// What the two parts of f32 queries or keys may leave of a logit: 2^-16 of s sum_d |q_d k_d|; an upper bound of it.
double from_parts(const Problem& p) {
  double largest_q = 0, largest = 0;
  const auto length = [&](const Array& x, int64_t row) {
    double square = 0;
    for (int64_t d = row * p.s.d; d < (row + 1) * p.s.d; ++d) square += x.values[size_t(d)] * x.values[size_t(d)];
    return std::isnan(square) ? 0 : std::sqrt(square);  // masked rows
  };
  for (int64_t n = 0; n < p.q.size() / p.s.d; ++n) largest_q = std::max(largest_q, length(p.q, n));
  for (const Sweep& w : p.sweeps)
    for (int64_t m = 0; m < w.k.size() / p.s.d && (is_f32(p.q) || is_f32(w.k)); ++m)
      largest = std::max(largest, double(p.scale) * largest_q * length(w.k, m));
  return 0x1p-16 * largest;
}

void check_emulated(Problem& p, const std::string& what) {
  make_values_positive(p);
  const Reference<double> exact(p);
  const Reference<float> plain(p);
  run_emulated(p);
  bool f32_values = false;
  for (const Sweep& w : p.sweeps) f32_values |= is_f32(w.v);
  const double logit = from_parts(p);
  check_budget(what + ": lse", p.lse, exact.lse, plain.lse, 1 + logit * 0x1p22);
  // Of the weights, above and below the fraction line, of the values, and of the result.
  const double rounding = 2 * 0x1p-8 + 0x1p-8 * f32_values + epsilon(p.out.view.dtype) / 2 + 2 * logit;
  double granted = 0;
  for (size_t i = 0; i < exact.out.size(); ++i) granted = std::max(granted, std::fabs(plain.out[i] - exact.out[i]));
  for (size_t i = 0; i < exact.out.size(); ++i) {
    const double tolerance = 1.02 * rounding * exact.out[i] + 2 * granted;
    if (std::fabs(p.out.get(int64_t(i)) - exact.out[i]) <= tolerance) continue;
    char text[120];
    std::snprintf(text, sizeof text, ": out %d is %.9g against %.9g", int(i), p.out.get(int64_t(i)), exact.out[i]);
    return check::fail(__FILE__, __LINE__, what + text);
  }
}

void check_emulated(const Sizes& sizes, const std::string& what) {
  Problem p(sizes);
  check_emulated(p, what);
}

template <class... Numbers>
std::string named(const char* name, Numbers... numbers) {
  std::string text = name;
  for (int64_t x : {int64_t(numbers)...}) text += " " + std::to_string(x);
  return text;
}

Sizes in_bf16(Sizes sizes) {
  sizes.q = sizes.k = sizes.v = bf16;
  return sizes;
}

}  // namespace

TEST(sizes) {
  for (int64_t d : {1, 31, 32, 33, 64, 100})
    for (int64_t e : {1, 16, 17, 64}) check_emulated(in_bf16({1, 1, 1, 19, d, e, {{70}}}), named("dims", d, e));
  for (int64_t n : {8, 16, 17, 70})
    for (int64_t m : {1, 63, 64, 65, 130})
      for (const VisibleRule& rule : {all_keys(), causal(n, m)})
        check_emulated(in_bf16({1, 1, 1, n, 16, 8, {{m, rule}}}), named("lengths", n, m));
}

TEST(rules_biases_and_masks) {
  const std::vector<VisibleRule> rules = {all_keys(),
                                          causal(70, 150),
                                          band(20, 7, 0),
                                          band(-1, 30, 60),
                                          band(5, -1, -30),
                                          band(0, 0, 3),
                                          {Visible::block, true, 80, -1, -1, 50, 1},
                                          {Visible::before, false, 40, -1, -1, 12, 5},
                                          {Visible::after, false, -5, -1, -1, 9, 4},
                                          {Visible::cell, false, 0, -1, -1, 1, 2}};
  for (size_t i = 0; i < rules.size(); ++i) {
    for (bool masked : {false, true}) {
      const SweepSizes one = {150, rules[i], 1, true, -0.1}, two = {75, rules[(i + 3) % rules.size()], 2};
      check_emulated(in_bf16({1, 2, 1, 70, 9, 20, {one}, masked}), named("rule", i, masked));
      check_emulated(in_bf16({2, 2, 1, 70, 9, 20, {two, one, {40}}, masked}), named("three sweeps", i, masked));
    }
  }
}

TEST(groups_and_layouts) {
  for (int64_t heads_kv : {1, 2, 4})
    for (Layout layout : {Layout::dense, Layout::loose})
      check_emulated(in_bf16({2, 4, heads_kv, 40, 24, 20, {{90, causal(40, 90), 4}}, true, layout}),
                     named("groups", heads_kv));
}

// Where only the queries or only the keys are bfloat16 the others keep 16 bits, which lse shows.
TEST(f32_meets_bf16) {
  for (double spread : {1.0, 4.0}) {
    for (DType v : {f32, bf16}) {
      for (DType out : {f32, bf16}) {
        Sizes sizes = {1,   2,    1, 40, 40, 20, {{90, causal(40, 90), 1, false, -0.05}}, true, Layout::dense,
                       f32, bf16, v, out};
        sizes.spread = spread;
        check_emulated(sizes, named("f32 queries", int(spread), int(v), int(out)));
        sizes.q = bf16, sizes.k = f32;
        check_emulated(sizes, named("f32 keys", int(spread), int(v), int(out)));
      }
    }
  }
  Sizes sizes = in_bf16({1, 1, 1, 33, 12, 9, {{70}, {90}}});
  Problem p(sizes);
  Sizes other = sizes;
  other.k = other.v = f32;
  Problem q(other);
  std::swap(p.sweeps[1], q.sweeps[1]);
  check_emulated(p, "sweeps of two dtypes");
}

TEST(growing_logits) {
  for (double spread : {10.0, 100.0, 1e4}) {
    Sizes sizes = in_bf16({1, 1, 1, 40, 8, 6, {{200, all_keys(), 0, true}, {50}}});
    sizes.spread = spread;
    check_emulated(sizes, named("growing logits", int64_t(spread)));
  }
}

// The mean of equal values is that value, for it is divided by what the values were multiplied with.
TEST(equal_values) {
  Problem p(in_bf16({1, 2, 1, 40, 16, 6, {{100, causal(40, 100)}, {30}}}));
  p.out = Array({1, 2, 40, 6}, f32);
  for (Sweep& w : p.sweeps)
    for (int64_t i = 0; i < w.v.size(); ++i) w.v.set(i, 1 + double(i % 6) / 8);
  run_emulated(p);
  for (int64_t i = 0; i < p.out.size(); ++i) CHECK_NEAR(p.out.get(i), 1 + double(i % 6) / 8, 1e-6);
}

TEST(one_key) {
  Sizes sizes = in_bf16({1, 1, 1, 9, 16, 40, {{1}}});
  sizes.v = f32;
  Problem p(sizes);
  run_emulated(p);
  for (int64_t i = 0; i < p.out.size(); ++i) {
    bfloat16 nearest;
    from_float(p.sweeps[0].v.get(i % 40), &nearest);
    CHECK_NEAR(p.out.get(i), to_float(nearest), 0x1p-22 * std::fabs(to_float(nearest)));
  }
}

TEST(only_lse) {
  Problem p(in_bf16({1, 2, 1, 40, 8, 6, {{100}}})), whole(p.s);
  SoftmaxAttentionArgs args = p.args();
  args.out = {}, args.dim_v = 0, args.sweeps[0].v = {};
  launch(args, 2), run_emulated(whole);
  CHECK(same_bits(p.lse, whole.lse));
}

TEST(later_tokens_and_threads) {
  for (double changed : {3.0, double(NAN), double(INFINITY)}) {
    Problem one(in_bf16({1, 2, 1, 90, 10, 10, {{90, causal(90, 90)}}})), other(one.s);
    set_row(other.sweeps[0].k, 50, changed), set_row(other.sweeps[0].v, 50, changed);
    run_emulated(one, 1), run_emulated(other, 3);
    for (int64_t row = 0; row < 180; ++row) {
      bool same = true;
      for (int64_t i = row * 10; i < row * 10 + 10; ++i) same &= one.out.get(i) == other.out.get(i);
      CHECK(same == (row % 90 < 50));
    }
  }
}

// A value that bfloat16 would round to infinity, and infinity itself, under weights of every size.
TEST(values_beyond_bf16) {
  Sizes sizes = in_bf16({1, 1, 1, 40, 8, 6, {{100, causal(40, 100)}}});
  sizes.v = f32;
  Problem p(sizes);
  for (int64_t m : {3, 66, 99}) p.sweeps[0].v.set(m * 6 + 2, 0x1.fffffep127);
  check_emulated(p, "largest f32");
  for (int64_t m : {70, 71, 80}) p.sweeps[0].v.set(m * 6 + 4, m == 71 ? NAN : INFINITY);
  run_emulated(p);
  for (int64_t n = 0; n < 40; ++n) {
    CHECK(std::isfinite(p.out.get(n * 6 + 3)));
    CHECK(n < 10 ? std::isfinite(p.out.get(n * 6 + 4)) : !std::isfinite(p.out.get(n * 6 + 4)));
    if (n >= 11) CHECK(std::isnan(p.out.get(n * 6 + 4)));
  }
}

TEST(nothing_seen) {
  Problem p(in_bf16({1, 1, 1, 20, 8, 6, {{30, band(0, 0, 100)}, {0}}}));
  run_emulated(p);
  for (int64_t i = 0; i < p.out.size(); ++i) CHECK(p.out.get(i) == 0);
  for (int64_t i = 0; i < p.lse.size(); ++i) CHECK(p.lse.get(i) == -kInfinity);
}

TEST(other_dtypes_go_to_v4) {
  const std::vector<std::string> rows = cpu::available();
  if (std::find(rows.begin(), rows.end(), "x86_64_v4") == rows.end()) SKIP("this machine cannot run x86_64_v4");
  for (const auto& [q, k, v] : {std::array{f32, f32, f32}, {f32, f32, bf16}, {f16, bf16, bf16}, {bf16, bf16, f16}}) {
    Sizes sizes = {1, 2, 1, 33, 7, 5, {{40}}};
    sizes.q = q, sizes.k = k, sizes.v = v;
    Problem p(sizes);
    const Reference<double> exact(p);
    const Reference<float> plain(p);
    run_emulated(p);
    check_budget("out", p.out, exact.out, plain.out);
    check_budget("lse", p.lse, exact.lse, plain.lse, 1);
  }
}

#else

TEST(amx) { SKIP("tile registers belong to x86-64"); }

#endif
