#include "ranked_problem.h"
#include "subquad/block_sum.h"

using namespace subquad;
using check::Array;
using check::Layout;
using check::Ranked;

namespace {

/// What a row does not see is NaN.
struct Problem {
  std::mt19937 random{7};
  Ranked ranked;
  int64_t heads, columns;
  Array y, x;

  Problem(int64_t b, int64_t h, int64_t n, int64_t m, int64_t k, bool masked, bool causal, Layout layout)
      : ranked(b, n, m, masked, causal, random),
        heads(h),
        columns(k),
        y({b, h, n, m}, DType::f32, layout),
        x({b, h, n, k}, DType::f32, layout) {
    y.fill_normal(random);
    std::vector<char> is_seen(y.values.size());
    for_each_pair([&](size_t, size_t key, int64_t) { is_seen[key] = 1; });
    for (int64_t i = 0; i < y.size(); ++i)
      if (!is_seen[size_t(i)]) y.set(i, NAN);
  }

  /// Calls body(row, index in y, column) in the order of the ranks.
  template <class F>
  void for_each_pair(F&& body) const {
    size_t row = 0;
    check::for_each_row(ranked.batch, heads, ranked.seq_q, [&](int64_t b, int64_t, int64_t n) {
      const int64_t count = ranked.count(b, n);
      for (int64_t rank = 0; rank < count; ++rank)
        body(row, row * size_t(ranked.seq_k) + size_t(ranked.key(b, rank)), Ranked::column(rank, count, columns));
      ++row;
    });
  }

  void run(int threads = 2) {
    std::fill(x.bytes.begin(), x.bytes.end(), 0xff);
    block_sum(Queue::cpu(threads), y.view, ranked.visible(), ranked.places(), x.view);
  }

  /// In float, in the promised order.
  std::vector<float> answer() const {
    std::vector<float> all(x.values.size());
    for_each_pair([&](size_t row, size_t key, int64_t column) {
      all[row * size_t(columns) + size_t(column)] += float(y.values[key]);
    });
    return all;
  }
};

}  // namespace

TEST(equation) {
  check::for_each_isa([&](const std::string&) {
    for (const bool masked : {false, true})
      for (const bool causal : {false, true})
        for (const int64_t columns : {1, 2, 7, 36, 37, 38, 75, 148})
          for (const Layout layout : {Layout::dense, Layout::loose}) {
            Problem p(3, 2, 41, 37, columns, masked, causal, layout);
            p.run();
            CHECK(check::same_bits(p.x.floats(), p.answer()));
          }
  });
}

TEST(threads_do_not_change_bits) {
  Problem p(2, 3, 200, 150, 33, true, true, Layout::dense);
  check::for_each_isa([&](const std::string&) {
    for (const int threads : {1, 2, 3, 16}) {
      p.run(threads);
      CHECK(check::same_bits(p.x.floats(), p.answer()));
    }
  });
}

TEST(empty_inputs) {
  Problem(0, 2, 3, 4, 5, true, false, Layout::dense).run();
  Problem(2, 0, 3, 4, 5, true, false, Layout::dense).run();
  Problem(2, 2, 0, 4, 5, true, false, Layout::dense).run();
  Problem keyless(2, 2, 3, 0, 5, true, false, Layout::dense);
  keyless.run();
  for (const float sum : keyless.x.floats()) CHECK(sum == 0);
}

TEST(errors) {
  Problem p(2, 2, 5, 6, 3, true, false, Layout::dense);
  const Queue queue = Queue::cpu(1);
  const auto call = [&](ConstTensor y, ConstTensor positions, Tensor x) {
    block_sum(queue, y, p.ranked.visible(), positions, x);
  };
  const ConstTensor positions = p.ranked.places();
  Array none({2, 2, 5, 0}, DType::f32);
  CHECK_THROWS(call(p.y.view, positions, none.view), "[block_sum] x: expected K of at least 1, got 0");
  CHECK_THROWS(call(p.y.view, p.ranked.visible(), p.x.view),
               "[block_sum] positions: expected shape [B, M] = [2, 6], got [2, 5]");
  CHECK_THROWS_AS(TypeMismatch, call({}, positions, p.x.view), "[block_sum] y: expected an array, got none");
  CHECK_THROWS(call(p.y.view, positions, p.y.view), "[block_sum] x: expected an output that shares no memory");
  p.ranked.counts.assign(14, 2);
  p.ranked.positions.assign(12, 6);
  CHECK_THROWS(call(p.y.view, positions, p.x.view),
               "[block_sum] positions: expected ascending keys in [0, 6) for the first 2 ranks, got 6 at [0, 0]");
}
