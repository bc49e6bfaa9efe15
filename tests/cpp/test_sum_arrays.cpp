#include "arrays.h"
#include "subquad/error.h"
#include "subquad/sum_arrays.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

struct Sizes {
  int64_t batch, heads, seq, dim;
};

/// The equation of the header in T, for terms whose shapes may be larger than that of out.
template <class T>
std::vector<double> reference(const std::vector<const Array*>& terms, const std::vector<double>& factors,
                              const Sizes& s) {
  std::vector<double> out(size_t(s.batch * s.heads * s.seq * s.dim));
  for (size_t i = 0; i < out.size(); ++i) {
    const int64_t row = int64_t(i) % (s.seq * s.dim), head = int64_t(i) / (s.seq * s.dim);
    const int64_t b = head / s.heads, h = head % s.heads;
    T sum = 0;
    for (size_t t = 0; t < terms.size(); ++t) {
      const int64_t items = terms[t]->view.shape[0], heads = terms[t]->view.shape[1], group = heads / s.heads;
      for (int64_t b2 = s.batch == 1 ? 0 : b; b2 < (s.batch == 1 ? items : b + 1); ++b2)
        for (int64_t h2 = h * group; h2 < (h + 1) * group; ++h2)
          sum += T(factors[t]) * T(terms[t]->values[size_t((b2 * heads + h2) * s.seq * s.dim + row)]);
    }
    out[i] = double(sum);
  }
  return out;
}

void check_sum(const Sizes& s, const std::vector<Sizes>& shapes, Layout layout, DType out_dtype) {
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f32};
  const double factors[] = {1, -0.75, 1.0 / 3, 2};
  std::mt19937 random(7);
  std::vector<Array> arrays;
  std::vector<const Array*> terms;
  for (size_t i = 0; i < shapes.size(); ++i) {
    arrays.emplace_back(std::initializer_list<int64_t>{shapes[i].batch, shapes[i].heads, s.seq, s.dim}, dtypes[i],
                        layout);
    arrays.back().fill_normal(random);
  }
  for (const Array& array : arrays) terms.push_back(&array);
  const std::vector<double> used(factors, factors + shapes.size());
  const std::vector<double> exact = reference<double>(terms, used, s), plain = reference<float>(terms, used, s);
  std::vector<float> first;
  for (const int threads : {1, 2, 3, 16}) {
    Array out({s.batch, s.heads, s.seq, s.dim}, out_dtype, layout);
    const Queue queue = Queue::cpu(threads);
    const auto term = [&](size_t i) { return SumTerm{arrays[i].view, factors[i]}; };
    if (shapes.size() == 1) sum_arrays(queue, {term(0)}, out.view);
    if (shapes.size() == 2) sum_arrays(queue, {term(0), term(1)}, out.view);
    if (shapes.size() == 3) sum_arrays(queue, {term(0), term(1), term(2)}, out.view);
    if (shapes.size() == 4) sum_arrays(queue, {term(0), term(1), term(2), term(3)}, out.view);
    CHECK_BUDGET("sum", out, exact, plain);
    if (threads == 1) first = out.floats();
    CHECK(check::same_bits(first, out.floats()));
  }
}

}  // namespace

TEST(matches_the_equation) {
  check::for_each_isa([](const std::string&) {
    for (const Layout layout : {Layout::dense, Layout::loose})
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const int64_t dim : {1, 2, 7, 16, 33, 64, 65}) {
          check_sum({2, 3, 5, dim}, {{2, 3, 0, 0}}, layout, dtype);
          check_sum({2, 3, 5, dim}, {{2, 3, 0, 0}, {2, 6, 0, 0}}, layout, dtype);
          check_sum({1, 2, 5, dim}, {{4, 2, 0, 0}, {1, 4, 0, 0}, {3, 8, 0, 0}}, layout, dtype);
          check_sum({1, 1, 3, dim}, {{2, 2, 0, 0}, {1, 1, 0, 0}, {5, 3, 0, 0}, {1, 4, 0, 0}}, layout, dtype);
        }
        check_sum({1, 2, 1, 2100}, {{1, 2, 0, 0}, {2, 2, 0, 0}}, layout, dtype);
        check_sum({2, 2, 2500, 1}, {{2, 2, 0, 0}, {2, 4, 0, 0}}, layout, dtype);
        check_sum({1, 1, 700, 3}, {{3, 1, 0, 0}, {1, 4, 0, 0}}, layout, dtype);
      }
  });
}

TEST(layouts_have_the_same_bits) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t dim : {1, 3, 19, 64}) {
      std::vector<float> results[2];
      for (const Layout layout : {Layout::dense, Layout::loose}) {
        std::mt19937 random(3);
        Array x({1, 4, 301, dim}, DType::f32, layout), y({1, 2, 301, dim}, DType::bf16, layout);
        Array out({1, 2, 301, dim}, DType::f32, layout);
        x.fill_normal(random), y.fill_normal(random);
        sum_arrays(Queue::cpu(2), {{x.view, 0.3}, {y.view, 0.7}}, out.view);
        results[int(layout)] = out.floats();
      }
      CHECK(check::same_bits(results[0], results[1]));
    }
  });
}

TEST(a_term_may_be_the_result) {
  check::for_each_isa([](const std::string&) {
    for (const Layout layout : {Layout::dense, Layout::loose}) {
      std::mt19937 random(3);
      Array x({2, 3, 400, 9}, DType::bf16, layout), y({2, 3, 400, 9}, DType::f32, layout);
      x.fill_normal(random), y.fill_normal(random);
      Array out({2, 3, 400, 9}, DType::bf16, layout);
      sum_arrays(Queue::cpu(3), {{y.view, 2}, {x.view, 0.5}}, out.view);
      sum_arrays(Queue::cpu(3), {{y.view, 2}, {x.view, 0.5}}, x.view);
      CHECK(check::same_bits(x.floats(), out.floats()));
      const Tensor own = y.view;
      Array expected({2, 3, 400, 9}, DType::f32);
      for (int64_t i = 0; i < y.size(); ++i) expected.set(i, 2 * y.values[size_t(i)]);
      sum_arrays(Queue::cpu(2), {{own}, {own}}, own);
      CHECK(check::same_bits(y.floats(), expected.floats()));
    }
  });
}

TEST(a_dtype_is_converted_exactly) {
  check::for_each_isa([](const std::string&) {
    const float values[] = {-0.0f, 0.0f, 1.5f, -INFINITY, INFINITY, 65519, 65520, 0x1p-25f, 3 * 0x1p-26f, 1e-40f, NAN};
    const int64_t count = int64_t(std::size(values));
    half halves[std::size(values)];
    sum_arrays(Queue::cpu(1), {{make_tensor(values, {1, 1, count, 1})}}, make_tensor(halves, {1, 1, count, 1}));
    for (int64_t i = 0; i < count; ++i) {
      half expected;
      from_float(values[i], &expected);
      CHECK(halves[i].bits == expected.bits || std::isnan(values[i]));
    }
    CHECK(std::isnan(to_float(halves[count - 1])));
    CHECK(std::signbit(to_float(halves[0])) && !std::signbit(to_float(halves[1])));
  });
}

TEST(infinite_terms_stay_infinite) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t count : {3, 40}) {
      std::vector<float> x(size_t(count), -INFINITY), y(size_t(count), 3), out(size_t(count), NAN);
      sum_arrays(Queue::cpu(1), {{make_tensor(x.data(), {1, 1, count, 1})}, {make_tensor(y.data(), {1, 1, count, 1})}},
                 make_tensor(out.data(), {1, 1, count, 1}));
      for (const float value : out) CHECK(value == -INFINITY);
    }
  });
}

TEST(an_axis_may_have_stride_zero) {
  check::for_each_isa([](const std::string&) {
    std::vector<float> x = {1, 2, 3, 4, 5}, out(2 * 3 * 4 * 5, NAN);
    ConstTensor spread = make_tensor(x.data(), {2, 6, 4, 5});
    for (int i = 0; i < 3; ++i) spread.stride[i] = 0;
    sum_arrays(Queue::cpu(2), {{spread}}, make_tensor(out.data(), {2, 3, 4, 5}));
    for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == 2 * x[i % 5]);
  });
}

TEST(empty_arrays) {
  check::for_each_isa([](const std::string&) {
    float x = 5, out[4] = {NAN, NAN, NAN, NAN};
    sum_arrays(Queue::cpu(1), {{make_tensor(&x, {0, 1, 2, 2})}, {make_tensor(&x, {1, 0, 2, 2})}},
               make_tensor(out, {1, 1, 2, 2}));
    for (const float value : out) CHECK(value == 0);
    sum_arrays(Queue::cpu(1), {{make_tensor(&x, {0, 1, 2, 2})}}, make_tensor(out, {0, 1, 2, 2}));
    sum_arrays(Queue::cpu(1), {{make_tensor(&x, {2, 0, 2, 2})}}, make_tensor(out, {2, 0, 2, 2}));
    sum_arrays(Queue::cpu(1), {{make_tensor(&x, {2, 2, 0, 2})}}, make_tensor(out, {2, 2, 0, 2}));
    sum_arrays(Queue::cpu(1), {{make_tensor(&x, {2, 2, 2, 0})}}, make_tensor(out, {2, 2, 2, 0}));
  });
}

TEST(errors_name_what_is_wrong) {
  std::vector<float> x(100), y(100);
  const Queue queue = Queue::cpu(1);
  const Tensor a = make_tensor(x.data(), {1, 2, 3, 4}), out = make_tensor(y.data(), {1, 2, 3, 4});
  CHECK_THROWS_AS(std::invalid_argument, sum_arrays(queue, {}, out),
                  "[sum_arrays] terms: expected 1 to 4 arrays, got 0");
  CHECK_THROWS(sum_arrays(queue, {{a}, {a}, {a}, {a}, {a}}, out), "[sum_arrays] terms: expected 1 to 4 arrays, got 5");
  CHECK_THROWS_AS(TypeMismatch, sum_arrays(queue, {{a}, {ConstTensor()}}, out),
                  "[sum_arrays] terms[1]: expected an array, got none");
  CHECK_THROWS_AS(TypeMismatch,
                  sum_arrays(queue, {{a}}, make_tensor(reinterpret_cast<int32_t*>(y.data()), {1, 2, 3, 4})),
                  "[sum_arrays] out: expected dtype float32 or float16 or bfloat16, got int32");
  CHECK_THROWS(sum_arrays(queue, {{a}, {make_tensor(x.data(), {1, 2, 4, 3})}}, out),
               "[sum_arrays] terms[1]: expected shape [B_i, H_i, N, D], got [1, 2, 4, 3]");
  CHECK_THROWS(sum_arrays(queue, {{make_tensor(x.data(), {3, 2, 3, 4})}}, make_tensor(y.data(), {2, 2, 3, 4})),
               "[sum_arrays] terms[0]: expected shape [B_i, H_i, N, D]");
  CHECK_THROWS(sum_arrays(queue, {{make_tensor(x.data(), {1, 3, 3, 4})}}, out),
               "[sum_arrays] terms[0]: expected a multiple of the 2 heads of out, got 3");
  CHECK_THROWS(sum_arrays(queue, {{a}, {make_tensor(y.data() + 4, {1, 2, 3, 4})}}, out),
               "[sum_arrays] out: expected an output that shares no memory with another argument");
  CHECK_THROWS(sum_arrays(queue, {{make_tensor(y.data(), {1, 4, 3, 4})}}, out), "[sum_arrays] out: expected an output");
}
