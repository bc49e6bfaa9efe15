#include "ranked_problem.h"
#include "subquad/teacher_blocks.h"

using namespace subquad;
using check::Array;
using check::Layout;
using check::Ranked;

namespace {

struct Sizes {
  int64_t b, h, hkv, n, m, d, columns;
  bool masked = false, causal = false;
  DType dtype = DType::f32;
  Layout layout = Layout::dense;
  double norm = 1;
};

struct Results {
  std::vector<double> masses, squares, plogp;
};

struct Problem {
  Sizes s;
  std::mt19937 random{11};
  Ranked ranked;
  Array q, k, masses, squares, plogp;

  explicit Problem(const Sizes& z)
      : s(z),
        ranked(z.b, z.n, z.m, z.masked, z.causal, random),
        q({z.b, z.h, z.n, z.d}, z.dtype, z.layout),
        k({z.b, z.hkv, z.m, z.d}, z.dtype, z.layout),
        masses({z.b, z.h, z.n, z.columns}, DType::f32, z.layout),
        squares({z.b, z.h, z.n}, DType::f32, z.layout),
        plogp({z.b, z.h, z.n}, DType::f32, z.layout) {
    q.fill_normal(random, z.norm), k.fill_normal(random, 1.5);
    spoil_unseen(ranked, q, k);
  }

  void run(int threads = 2, double scale = 0) {
    const Queue queue = Queue::cpu(threads);
    for (Array* a : {&masses, &squares, &plogp}) std::fill(a->bytes.begin(), a->bytes.end(), 0xff);
    const int64_t bytes = teacher_blocks_workspace_bytes(queue, q.view, k.view, scale, ranked.visible(),
                                                         ranked.places(), masses.view, squares.view, plogp.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    teacher_blocks(queue, q.view, k.view, scale, ranked.visible(), ranked.places(), masses.view, squares.view,
                   plogp.view, {workspace.data(), bytes});
  }

  template <class T>
  Results answer(double scale = 0) const {
    Results to;
    check::for_each_row(s.b, s.h, s.n, [&](int64_t b, int64_t h, int64_t n) {
      const check::SoftmaxRow<T> row(check::logits_of_row<T>(ranked, q, k, scale, b, h, n));
      std::vector<T> masses_of_row(static_cast<size_t>(s.columns));
      T squares_of_row = 0, plogp_of_row = 0;
      const int64_t count = ranked.count(b, n);
      for (int64_t rank = 0; rank < count; ++rank) {
        const T p = row.p[size_t(rank)];
        masses_of_row[size_t(Ranked::column(rank, count, s.columns))] += p;
        squares_of_row += p * p, plogp_of_row += p * row.log_p[size_t(rank)];
      }
      to.masses.insert(to.masses.end(), masses_of_row.begin(), masses_of_row.end());
      to.squares.push_back(double(squares_of_row)), to.plogp.push_back(double(plogp_of_row));
    });
    return to;
  }

  std::vector<float> bits() const {
    std::vector<float> all = masses.floats();
    for (const Array* a : {&squares, &plogp})
      for (const float x : a->floats()) all.push_back(x);
    return all;
  }
};

void check_equation(const Sizes& sizes, double scale = 0) {
  Problem p(sizes);
  const Results exact = p.answer<double>(scale), plain = p.answer<float>(scale);
  char what[120];
  std::snprintf(what, sizeof what, "n %d m %d d %d K %d%s%s norm %g", int(sizes.n), int(sizes.m), int(sizes.d),
                int(sizes.columns), sizes.masked ? " masked" : "", sizes.causal ? " causal" : "", sizes.norm);
  check::for_each_isa([&](const std::string&) {
    p.run(2, scale);
    CHECK_BUDGET(what + std::string(" masses"), p.masses, exact.masses, plain.masses);
    CHECK_BUDGET(what + std::string(" sum_squares"), p.squares, exact.squares, plain.squares);
    CHECK_BUDGET(what + std::string(" sum_plogp"), p.plogp, exact.plogp, plain.plogp);
  });
}

}  // namespace

TEST(equation) {
  for (const bool masked : {false, true})
    for (const bool causal : {false, true}) {
      check_equation({2, 4, 2, 37, 37, 16, 9, masked, causal});
      check_equation({3, 2, 1, 70, 150, 33, 40, masked, causal, DType::f16, Layout::loose});
      check_equation({1, 2, 2, 150, 70, 64, 7, masked, causal, DType::bf16});
      check_equation({2, 2, 1, 60, 300, 130, 64, masked, causal, DType::f32, Layout::loose}, 0.4);
    }
  for (const int64_t m : {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129}) check_equation({1, 2, 1, 20, m, 7, 5});
  for (const int64_t d : {1, 3, 8, 31, 512}) check_equation({1, 2, 1, 20, 40, d, 5, true, true});
}

TEST(columns_from_one_to_four_times_the_keys) {
  for (const int64_t columns : {1, 2, 3, 31, 32, 49, 63, 64, 65, 97, 98, 130, 260, 388})
    for (const bool causal : {false, true}) check_equation({1, 2, 2, 97, 97, 12, columns, causal, causal});
}

TEST(large_logits_and_growing_ones) {
  // Norms that leave one key, and logits that grow from key to key by more than the masses are kept apart for.
  check_equation({1, 2, 2, 40, 200, 16, 30, true, true, DType::f32, Layout::dense, 1e5});
  check_equation({1, 2, 2, 40, 200, 16, 30, false, false, DType::f32, Layout::dense, 20});
  for (const double step : {0.001, 0.1, 0.9, 3.0, 400.0}) {
    Problem p({1, 1, 1, 12, 500, 1, 77});
    for (int64_t n = 0; n < 12; ++n) p.q.set(n, n % 2 ? 1 : -1);
    for (int64_t m = 0; m < 500; ++m) p.k.set(m, step * double(m));
    const Results exact = p.answer<double>(1), plain = p.answer<float>(1);
    check::for_each_isa([&](const std::string&) {
      p.run(1, 1);
      CHECK_BUDGET("growing masses", p.masses, exact.masses, plain.masses);
      CHECK_BUDGET("growing sum_squares", p.squares, exact.squares, plain.squares);
      CHECK_BUDGET("growing sum_plogp", p.plogp, exact.plogp, plain.plogp);
    });
  }
}

TEST(masses_sum_to_one) {
  Problem p({2, 2, 1, 50, 90, 24, 13, true, true});
  check::for_each_isa([&](const std::string&) {
    p.run();
    check::for_each_row(2, 2, 50, [&](int64_t b, int64_t h, int64_t n) {
      double sum = 0;
      for (int64_t c = 0; c < 13; ++c) sum += p.masses.get(((b * 2 + h) * 50 + n) * 13 + c);
      CHECK_NEAR(sum, p.ranked.count(b, n) > 0 ? 1 : 0, 1e-6);
    });
  });
}

TEST(threads_do_not_change_bits) {
  Problem p({2, 3, 3, 300, 300, 20, 41, true, true});
  check::for_each_isa([&](const std::string&) {
    p.run(1);
    const std::vector<float> one = p.bits();
    for (const int threads : {2, 3, 16}) {
      p.run(threads);
      CHECK(check::same_bits(one, p.bits()));
    }
  });
}

TEST(later_keys_have_no_effect) {
  check::for_each_isa([&](const std::string&) {
    Problem p({1, 2, 1, 100, 100, 20, 31, false, true});
    p.run();
    const std::vector<float> before = p.masses.floats(), plogp = p.plogp.floats();
    for (int64_t i = 0; i < 2 * 100 * 20; ++i)
      if (i / 20 % 100 >= 60) p.q.set(i, NAN);
    for (int64_t i = 60 * 20; i < 100 * 20; ++i) p.k.set(i, i % 2 ? NAN : INFINITY);
    p.run();
    const std::vector<float> after = p.masses.floats();
    int changed = 0;
    for (int64_t row = 0; row < 200; ++row) {
      const bool same = !std::memcmp(&before[size_t(row * 31)], &after[size_t(row * 31)], 31 * sizeof(float));
      if (row % 100 < 60) CHECK(same && plogp[size_t(row)] == p.plogp.get(row));
      changed += !same;
    }
    CHECK(changed == 80);
  });
}

TEST(workspace_needs_no_data) {
  Problem p({2, 3, 3, 50, 60, 20, 41, true, true});
  const Queue queue = Queue::cpu(2);
  ConstTensor visible = p.ranked.visible(), positions = p.ranked.places();
  const auto bytes = [&] {
    return teacher_blocks_workspace_bytes(queue, p.q.view, p.k.view, 0, visible, positions, p.masses.view,
                                          p.squares.view, p.plogp.view);
  };
  const int64_t with_data = bytes();
  visible.data = reinterpret_cast<const void*>(64), positions.data = reinterpret_cast<const void*>(1 << 20);
  CHECK(with_data > 0 && bytes() == with_data);
}

TEST(empty_inputs) {
  const auto run = [](const Sizes& sizes) {
    Problem p(sizes);
    p.run();
    for (const float x : p.bits()) CHECK(x == 0);
  };
  run({0, 2, 1, 3, 4, 5, 2});
  run({2, 0, 0, 3, 4, 5, 2});
  run({2, 2, 1, 0, 4, 5, 2});
  run({2, 2, 1, 3, 0, 5, 2});
}

TEST(errors) {
  Problem p({2, 2, 1, 5, 6, 4, 3, true});
  const Queue queue = Queue::cpu(1);
  const auto call = [&](ConstTensor q, ConstTensor k, double scale, ConstTensor visible, ConstTensor positions,
                        Tensor masses) {
    std::vector<char> workspace(1 << 20);
    teacher_blocks(queue, q, k, scale, visible, positions, masses, p.squares.view, p.plogp.view,
                   {workspace.data(), int64_t(workspace.size())});
  };
  const ConstTensor q = p.q.view, k = p.k.view, visible = p.ranked.visible(), positions = p.ranked.places();
  const Tensor masses = p.masses.view;
  CHECK_THROWS(call(p.k.view, p.squares.view, 0, visible, positions, masses), "[teacher_blocks] k: expected shape");
  for (const double scale : {-1.0, 1e-60, 1e60, double(NAN)})
    CHECK_THROWS(call(q, k, scale, visible, positions, masses),
                 "[teacher_blocks] scale: expected a finite number above 0");
  CHECK_THROWS_AS(TypeMismatch, call(q, k, 0, {}, positions, masses),
                  "[teacher_blocks] visible: expected an array, got none");
  CHECK_THROWS(call(q, k, 0, positions, positions, masses),
               "[teacher_blocks] visible: expected shape [B, N] = [2, 5], got [2, 6]");
  CHECK_THROWS(call(q, k, 0, visible, visible, masses),
               "[teacher_blocks] positions: expected shape [B, M] = [2, 6], got [2, 5]");
  Array none({2, 2, 5, 0}, DType::f32);
  CHECK_THROWS(call(q, k, 0, visible, positions, none.view),
               "[teacher_blocks] masses (axis K): expected a value in [1, 1048576], got 0");
  Tensor inside = masses;
  inside.data = p.squares.view.data;
  CHECK_THROWS(call(q, k, 0, visible, positions, inside), "[teacher_blocks] masses: expected an output that shares");

  p.ranked.counts.assign(14, 3);
  p.ranked.positions = {0, 2, 4, -1, -1, -1, 1, 3, 5, -1, -1, -1};
  call(q, k, 0, visible, p.ranked.places(), masses);
  p.ranked.counts[8] = 7;
  CHECK_THROWS(call(q, k, 0, visible, p.ranked.places(), masses),
               "[teacher_blocks] visible: expected values in [0, 6], got 7 at [1, 1]");
  p.ranked.counts[8] = 4;
  CHECK_THROWS(call(q, k, 0, visible, p.ranked.places(), masses),
               "[teacher_blocks] positions: expected ascending keys in [0, 6) for the first 4 ranks, got -1 after 5");
  p.ranked.positions[9] = 5;
  CHECK_THROWS(
      call(q, k, 0, visible, p.ranked.places(), masses),
      "[teacher_blocks] positions: expected ascending keys in [0, 6) for the first 4 ranks, got 5 after 5 at [1, 3]");
}
