#include "arrays.h"
#include "subquad/error.h"
#include "subquad/row_dot.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

struct Problem {
  int64_t dim;
  Array x, y, z, out;

  Problem(int64_t d, DType dtype, Layout layout)
      : dim(d),
        x({2, 3, 7, d}, dtype, layout),
        y({2, 3, 7, d}, DType::f32, layout),
        z({2, 3, 7, d}, dtype, layout),
        out({2, 3, 7}, DType::f32, layout) {
    std::mt19937 random(int(d) + 5);
    for (Array* a : {&x, &y, &z}) a->fill_normal(random);
  }

  template <class T>
  std::vector<double> answer(bool with_z) const {
    std::vector<double> sums;
    for (int64_t row = 0; row < 42; ++row) {
      T sum = 0;
      for (int64_t i = row * dim; i < (row + 1) * dim; ++i)
        sum += T(x.values[size_t(i)]) * (T(y.values[size_t(i)]) - (with_z ? T(z.values[size_t(i)]) : T(0)));
      sums.push_back(double(sum));
    }
    return sums;
  }
};

}  // namespace

TEST(equation) {
  for (int64_t d : {1, 3, 15, 16, 17, 64, 511, 512, 513, 1100}) {
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (Layout layout : {Layout::dense, Layout::loose}) {
        Problem p(d, dtype, layout);
        check::for_each_isa([&](const std::string&) {
          for (bool with_z : {false, true}) {
            row_dot(Queue::cpu(1), p.x.view, p.y.view, with_z ? ConstTensor(p.z.view) : ConstTensor(), p.out.view);
            const std::vector<double> exact = p.answer<double>(with_z), plain = p.answer<float>(with_z);
            // Few terms may sum exactly by luck: the order of a sum costs up to its magnitude times an ulp.
            for (size_t i = 0; i < exact.size(); ++i)
              CHECK_NEAR(p.out.get(int64_t(i)), exact[i],
                         std::fmax(2 * std::fabs(plain[i] - exact[i]), 4e-7 * std::sqrt(double(d)) * 6));
          }
        });
      }
    }
  }
}

TEST(threads_do_not_change_bits) {
  Problem p(70, DType::f32, Layout::dense);
  check::for_each_isa([&](const std::string&) {
    row_dot(Queue::cpu(1), p.x.view, p.y.view, p.z.view, p.out.view);
    const std::vector<float> one = p.out.floats();
    for (int threads : {2, 3, 16}) {
      row_dot(Queue::cpu(threads), p.x.view, p.y.view, p.z.view, p.out.view);
      CHECK(check::same_bits(one, p.out.floats()));
    }
  });
}

TEST(rows_stand_alone) {
  Problem p(20, DType::f32, Layout::dense);
  p.x.set(5 * 20, NAN);
  row_dot(Queue::cpu(1), p.x.view, p.y.view, {}, p.out.view);
  for (int64_t i = 0; i < 42; ++i) CHECK(std::isnan(p.out.get(i)) == (i == 5));
}

TEST(errors_and_empty) {
  Problem p(4, DType::f32, Layout::dense), q(5, DType::f32, Layout::dense);
  const Queue queue = Queue::cpu(1);
  CHECK_THROWS(row_dot(queue, p.x.view, q.y.view, {}, p.out.view),
               "[row_dot] y: expected shape [B, H, N, D] = [2, 3, 7, 4], got [2, 3, 7, 5]");
  CHECK_THROWS_AS(TypeMismatch, row_dot(queue, {}, p.y.view, {}, p.out.view),
                  "[row_dot] x: expected an array, got none");
  Tensor inside = p.out.view;
  inside.data = p.x.view.data;
  CHECK_THROWS(row_dot(queue, p.x.view, p.y.view, {}, inside),
               "[row_dot] out: expected an output that shares no memory");
  Array none({0, 3, 7, 4}, DType::f32), result({0, 3, 7}, DType::f32);
  row_dot(queue, none.view, none.view, {}, result.view);
}
