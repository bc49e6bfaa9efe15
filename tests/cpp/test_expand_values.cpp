#include "ranked_problem.h"
#include "subquad/block_sum.h"
#include "subquad/expand_values.h"

using namespace subquad;
using check::Array;
using check::Layout;
using check::Ranked;

namespace {

struct Problem {
  std::mt19937 random{3};
  Ranked ranked;
  int64_t heads, columns;
  Array x, y;

  Problem(int64_t b, int64_t h, int64_t n, int64_t m, int64_t k, bool masked, bool causal, Layout layout)
      : ranked(b, n, m, masked, causal, random),
        heads(h),
        columns(k),
        x({b, h, n, k}, DType::f32, layout),
        y({b, h, n, m}, DType::f32, layout) {
    x.fill_normal(random);
  }

  void run(int threads = 2) {
    std::fill(y.bytes.begin(), y.bytes.end(), 0xff);
    expand_values(Queue::cpu(threads), x.view, ranked.visible(), ranked.places(), y.view);
  }

  /// Element by element: the column of a key's rank, or 0.
  std::vector<float> answer() const {
    std::vector<float> all(y.values.size());
    size_t row = 0;
    check::for_each_row(ranked.batch, heads, ranked.seq_q, [&](int64_t b, int64_t, int64_t n) {
      const int64_t count = ranked.count(b, n);
      for (int64_t rank = 0; rank < count; ++rank)
        all[row * size_t(ranked.seq_k) + size_t(ranked.key(b, rank))] =
            float(x.values[row * size_t(columns) + size_t(Ranked::column(rank, count, columns))]);
      ++row;
    });
    return all;
  }
};

template <class F>
void for_each_problem(F&& body) {
  for (const bool masked : {false, true})
    for (const bool causal : {false, true})
      for (const int64_t columns : {1, 2, 7, 36, 37, 38, 75, 148})
        for (const Layout layout : {Layout::dense, Layout::loose})
          body(Problem(3, 2, 41, 37, columns, masked, causal, layout));
}

}  // namespace

TEST(equation) {
  check::for_each_isa([&](const std::string&) {
    for_each_problem([](Problem&& p) {
      p.run();
      CHECK(check::same_bits(p.y.floats(), p.answer()));
    });
  });
}

TEST(large_columns_and_counts) {
  check::for_each_isa([&](const std::string&) {
    for (const int64_t columns : {int64_t(1) << 20, (int64_t(1) << 20) - 1}) {
      Problem p(1, 1, 2, 1000, columns, false, true, Layout::dense);
      p.run();
      CHECK(check::same_bits(p.y.floats(), p.answer()));
    }
    Problem wide(1, 1, 2, 1 << 20, 12345, false, false, Layout::dense);
    wide.run();
    CHECK(check::same_bits(wide.y.floats(), wide.answer()));
  });
}

TEST(adjoint) {
  check::for_each_isa([&](const std::string&) {
    for_each_problem([](Problem&& p) {
      Array z({3, 2, 41, 37}, DType::f32), sums({3, 2, 41, p.columns}, DType::f32);
      z.fill_normal(p.random);
      p.run();
      block_sum(Queue::cpu(2), z.view, p.ranked.visible(), p.ranked.places(), sums.view);
      double left = 0, right = 0, size = 0;
      for (int64_t i = 0; i < z.size(); ++i) {
        left += double(p.y.get(i)) * z.values[size_t(i)];
        size += std::fabs(double(p.y.get(i)) * z.values[size_t(i)]);
      }
      for (int64_t i = 0; i < p.x.size(); ++i) right += p.x.values[size_t(i)] * double(sums.get(i));
      CHECK_NEAR(left, right, 37 * 0x1p-24 * size);
    });
  });
}

TEST(threads_do_not_change_bits) {
  Problem p(2, 3, 200, 150, 33, true, true, Layout::dense);
  check::for_each_isa([&](const std::string&) {
    for (const int threads : {1, 2, 3, 16}) {
      p.run(threads);
      CHECK(check::same_bits(p.y.floats(), p.answer()));
    }
  });
}

TEST(empty_inputs) {
  Problem(0, 2, 3, 4, 5, true, false, Layout::dense).run();
  Problem(2, 0, 3, 4, 5, true, false, Layout::dense).run();
  Problem(2, 2, 0, 4, 5, true, false, Layout::dense).run();
  Problem(2, 2, 3, 0, 5, true, false, Layout::dense).run();
}

TEST(errors) {
  Problem p(2, 2, 5, 6, 3, true, false, Layout::dense);
  const Queue queue = Queue::cpu(1);
  const auto call = [&](ConstTensor x, ConstTensor visible, Tensor y) {
    expand_values(queue, x, visible, p.ranked.places(), y);
  };
  const ConstTensor visible = p.ranked.visible();
  Array none({2, 2, 5, 0}, DType::f32);
  CHECK_THROWS(call(none.view, visible, p.y.view), "[expand_values] x: expected K of at least 1, got 0");
  CHECK_THROWS(call(p.x.view, p.ranked.places(), p.y.view),
               "[expand_values] visible: expected shape [B, N] = [2, 5], got [2, 6]");
  CHECK_THROWS_AS(TypeMismatch, call(p.x.view, {}, p.y.view), "[expand_values] visible: expected an array, got none");
  Tensor inside = p.y.view;
  inside.data = p.x.view.data;
  CHECK_THROWS(call(p.x.view, visible, inside), "[expand_values] y: expected an output that shares no memory");
  p.ranked.counts[8] = -1;
  CHECK_THROWS(call(p.x.view, visible, p.y.view),
               "[expand_values] visible: expected values in [0, 6], got -1 at [1, 1]");
}
