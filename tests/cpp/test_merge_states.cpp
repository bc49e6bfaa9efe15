#include "arrays.h"
#include "subquad/error.h"
#include "subquad/merge_states.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Sizes {
  int64_t batch, heads, n, dim;
  bool with_dlse = true;
  Layout layout = Layout::dense;
  DType dtype1 = DType::f32, dtype2 = DType::f32, dtype_out = DType::f32;
};

struct Answers {
  std::vector<double> out, lse, dout1, dlse1, dout2, dlse2;
};

struct Problem {
  Sizes s;
  Array out1, lse1, out2, lse2, out, lse, dout, dlse, dout1, dlse1, dout2, dlse2;

  explicit Problem(const Sizes& sizes)
      : s(sizes),
        out1(rows(s.dtype1)),
        lse1(row_values()),
        out2(rows(s.dtype2)),
        lse2(row_values()),
        out(rows(s.dtype_out)),
        lse(row_values()),
        dout(rows(s.dtype_out)),
        dlse(row_values()),
        dout1(rows(s.dtype1)),
        dlse1(row_values()),
        dout2(rows(s.dtype2)),
        dlse2(row_values()) {
    std::mt19937 random(31);
    for (Array* x : {&out1, &out2, &dout, &dlse}) x->fill_normal(random);
    for (Array* x : {&lse1, &lse2}) x->fill_normal(random, 3);
    // Empty parts, whose out, and for two of them the gradient too, must have no effect.
    for (int64_t i = 0; i < lse1.size(); ++i) {
      if (i % 5 == 1) lse1.set(i, -kInf);
      if (i % 5 == 2 || i % 10 == 1) lse2.set(i, -kInf);
      if (i % 11 == 4) lse1.set(i, lse1.values[size_t(i)] - 200);
      for (int64_t d = 0; d < s.dim; ++d) {
        if (lse1.values[size_t(i)] == -kInf) out1.set(i * s.dim + d, NAN);
        if (lse2.values[size_t(i)] == -kInf) out2.set(i * s.dim + d, d % 2 ? NAN : INFINITY);
        if (empty(i)) dout.set(i * s.dim + d, NAN);
      }
      if (empty(i)) dlse.set(i, NAN);
    }
  }

  Array rows(DType dtype) const { return Array({s.batch, s.heads, s.n, s.dim}, dtype, s.layout); }
  Array row_values() const { return Array({s.batch, s.heads, s.n}, DType::f32, s.layout); }
  bool empty(int64_t i) const { return lse1.values[size_t(i)] == -kInf && lse2.values[size_t(i)] == -kInf; }

  /// The equations of the header in T.
  template <class T>
  Answers answers() const {
    Answers a;
    a.out.resize(out.values.size()), a.dout1 = a.dout2 = a.out;
    a.lse.resize(lse.values.size()), a.dlse1 = a.dlse2 = a.lse;
    for (size_t i = 0; i < lse.values.size(); ++i) {
      const T l1 = T(lse1.values[i]), l2 = T(lse2.values[i]), top = std::max(l1, l2);
      a.lse[i] = -kInf;
      if (empty(int64_t(i))) continue;
      const T joint = top + std::log(std::exp(l1 - top) + std::exp(l2 - top));
      const T w1 = std::exp(l1 - joint), w2 = std::exp(l2 - joint);
      T along1 = 0, along2 = 0;
      for (size_t j = i * size_t(s.dim); j < (i + 1) * size_t(s.dim); ++j) {
        const T x1 = w1 == 0 ? T(0) : T(out1.values[j]), x2 = w2 == 0 ? T(0) : T(out2.values[j]);
        const T y = w1 * x1 + w2 * x2, g = T(dout.values[j]);
        a.out[j] = double(y), a.dout1[j] = double(w1 * g), a.dout2[j] = double(w2 * g);
        along1 += g * (x1 - y), along2 += g * (x2 - y);
      }
      const T from_lse = s.with_dlse ? T(dlse.values[i]) : T(0);
      a.lse[i] = double(joint);
      a.dlse1[i] = w1 == 0 ? 0 : double(w1 * (along1 + from_lse));
      a.dlse2[i] = w2 == 0 ? 0 : double(w2 * (along2 + from_lse));
    }
    return a;
  }

  void run(int threads) {
    const Queue queue = Queue::cpu(threads);
    merge_states(queue, out1.view, lse1.view, out2.view, lse2.view, out.view, lse.view);
    merge_states_bwd(queue, dout.view, s.with_dlse ? ConstTensor(dlse.view) : ConstTensor(), out1.view, lse1.view,
                     out2.view, lse2.view, dout1.view, dlse1.view, dout2.view, dlse2.view);
  }
};

void check_problem(const Sizes& s) {
  Problem p(s);
  const Answers exact = p.answers<double>();
  const Answers plain = p.answers<float>();
  std::vector<float> first[6];
  for (const int threads : {1, 2, 3, 16}) {
    p.run(threads);
    CHECK_BUDGET("out", p.out, exact.out, plain.out);
    CHECK_BUDGET("lse", p.lse, exact.lse, plain.lse);
    CHECK_BUDGET("dout1", p.dout1, exact.dout1, plain.dout1);
    CHECK_BUDGET("dlse1", p.dlse1, exact.dlse1, plain.dlse1);
    CHECK_BUDGET("dout2", p.dout2, exact.dout2, plain.dout2);
    CHECK_BUDGET("dlse2", p.dlse2, exact.dlse2, plain.dlse2);
    int i = 0;
    for (const Array* x : {&p.out, &p.lse, &p.dout1, &p.dlse1, &p.dout2, &p.dlse2}) {
      if (threads == 1) first[i] = x->floats();
      CHECK(check::same_bits(first[i++], x->floats()));
    }
  }
}

}  // namespace

TEST(matches_the_equations) {
  check::for_each_isa([](const std::string&) {
    for (const Layout layout : {Layout::dense, Layout::loose})
      for (const bool with_dlse : {false, true}) {
        for (const int64_t dim : {1, 3, 7, 8, 15, 16, 17, 33, 64, 512})
          check_problem({2, 3, 21, dim, with_dlse, layout});
        for (const DType dtype1 : {DType::f32, DType::f16, DType::bf16})
          for (const DType dtype2 : {DType::f32, DType::f16, DType::bf16})
            for (const DType dtype_out : {DType::f32, DType::f16, DType::bf16})
              check_problem({2, 1, 13, 20, with_dlse, layout, dtype1, dtype2, dtype_out});
        check_problem({1, 2, 700, 64, with_dlse, layout});
      }
  });
}

TEST(a_part_without_keys_has_no_effect) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 2, 30, 19});
    p.run(1);
    for (int64_t i = 0; i < p.lse.size(); ++i) {
      const bool none1 = p.lse1.values[size_t(i)] == -kInf, none2 = p.lse2.values[size_t(i)] == -kInf;
      if (none1 != none2) CHECK(p.lse.get(i) == float((none1 ? p.lse2 : p.lse1).values[size_t(i)]));
      if (none1 && none2) CHECK(p.lse.get(i) == -kInf);
      if (none1) CHECK(p.dlse1.get(i) == 0);
      if (none2) CHECK(p.dlse2.get(i) == 0);
      for (int64_t j = i * 19; j < (i + 1) * 19; ++j) {
        if (none1 != none2) CHECK(p.out.get(j) == (none1 ? p.out2 : p.out1).get(j));
        if (none1 && none2) CHECK(p.out.get(j) == 0);
        if (none1) CHECK(p.dout1.get(j) == 0);
        if (none2) CHECK(p.dout2.get(j) == 0);
      }
    }
  });
}

TEST(weights_depend_on_the_difference_of_lse_alone) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 2, 30, 19}), shifted({1, 2, 30, 19});
    for (int64_t i = 0; i < p.lse1.size(); ++i)
      for (const auto& pair : {std::pair<Array*, Array*>(&p.lse1, &shifted.lse1), {&p.lse2, &shifted.lse2}}) {
        const double coarse = std::floor(pair.first->values[size_t(i)] * 64) / 64;
        pair.first->set(i, coarse), pair.second->set(i, coarse + 16384);
      }
    p.run(1), shifted.run(1);
    for (const auto& pair : {std::pair<Array*, Array*>(&p.out, &shifted.out),
                             {&p.dout1, &shifted.dout1},
                             std::pair<Array*, Array*>(&p.dlse1, &shifted.dlse1),
                             {&p.dlse2, &shifted.dlse2}})
      CHECK(check::same_bits(pair.first->floats(), pair.second->floats()));
    for (int64_t i = 0; i < p.lse.size(); ++i) CHECK_NEAR(shifted.lse.get(i), p.lse.get(i) + 16384, 0x1p-10);
  });
}

TEST(central_differences) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 1, 4, 3});
    p.run(1);
    const auto loss = [&] {
      const Answers a = p.answers<double>();
      double sum = 0;
      for (size_t i = 0; i < a.lse.size(); ++i) {
        if (p.empty(int64_t(i))) continue;
        sum += p.dlse.values[i] * a.lse[i];
        for (size_t j = 3 * i; j < 3 * i + 3; ++j) sum += p.dout.values[j] * a.out[j];
      }
      return sum;
    };
    for (const auto& pair : {std::pair<Array*, Array*>(&p.out1, &p.dout1),
                             {&p.lse1, &p.dlse1},
                             std::pair<Array*, Array*>(&p.out2, &p.dout2),
                             {&p.lse2, &p.dlse2}})
      for (int64_t i = 0; i < pair.first->size(); ++i) {
        double& x = pair.first->values[size_t(i)];
        const double kept = x;
        x = kept + 1e-4;
        const double above = loss();
        x = kept - 1e-4;
        const double below = loss();
        x = kept;
        CHECK_NEAR(pair.second->get(i), (above - below) / 2e-4, 3e-6);
      }
  });
}

TEST(empty_arrays) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s : {Sizes{0, 2, 3, 4}, Sizes{2, 0, 3, 4}, Sizes{2, 2, 0, 4}}) Problem(s).run(2);
  });
}

TEST(errors_name_what_is_wrong) {
  Problem p({1, 2, 3, 4});
  const Queue queue = Queue::cpu(1);
  const Tensor short_lse = make_tensor(reinterpret_cast<float*>(p.lse.bytes.data()), {1, 2, 2});
  const Tensor other = make_tensor(reinterpret_cast<float*>(p.out.bytes.data()), {1, 2, 4, 3});
  const auto forward = [&](const Tensor& out1, const Tensor& lse1, const Tensor& out2, const Tensor& out,
                           const Tensor& lse) { merge_states(queue, out1, lse1, out2, p.lse2.view, out, lse); };
  const Tensor out1 = p.out1.view, lse1 = p.lse1.view, out2 = p.out2.view, out = p.out.view, lse = p.lse.view;
  CHECK_THROWS_AS(std::invalid_argument, forward(out1, short_lse, out2, out, lse),
                  "[merge_states] lse1: expected shape [B, H, N] = [1, 2, 3], got [1, 2, 2]");
  CHECK_THROWS(forward(out1, lse1, other, out, lse),
               "[merge_states] out2: expected shape [B, H, N, E] = [1, 2, 3, 4], got [1, 2, 4, 3]");
  CHECK_THROWS(forward(lse1, lse1, out2, out, lse), "[merge_states] out1: expected shape");
  CHECK_THROWS_AS(TypeMismatch, forward(out1, lse1, out2, out, Tensor()), "[merge_states] lse: expected an array");
  CHECK_THROWS(forward(out1, lse1, out2, out2, lse), "[merge_states] out: expected an output that shares no memory");
  CHECK_THROWS(forward(out1, lse1, out2, out, lse1), "[merge_states] lse: expected an output that shares no memory");
  const Array wide({1, 1, 2, 513}, DType::f32), to({1, 1, 2, 513}, DType::f32), sum({1, 1, 2}, DType::f32);
  CHECK_THROWS_AS(Unsupported,
                  merge_states(queue, wide.view, sum.view, wide.view, sum.view, to.view,
                               make_tensor(reinterpret_cast<float*>(p.lse.bytes.data()), {1, 1, 2})),
                  "a head dimension above 512");
  const auto backward = [&](const ConstTensor& dlse, const Tensor& dout1, const Tensor& dlse2) {
    merge_states_bwd(queue, p.dout.view, dlse, out1, lse1, out2, p.lse2.view, dout1, p.dlse1.view, p.dout2.view, dlse2);
  };
  CHECK_THROWS(backward(short_lse, p.dout1.view, p.dlse2.view), "[merge_states_bwd] dlse: expected shape [B, H, N]");
  CHECK_THROWS(backward(p.dlse.view, p.dout2.view, p.dlse2.view), "[merge_states_bwd] dout1: expected an output that");
  CHECK_THROWS(backward(p.dlse.view, p.dout1.view, p.dlse1.view), "[merge_states_bwd] dlse1: expected an output that");
}
