// sparse_attention against its equation in double, on every row of kernels this machine can run.
#include "sparse_attention_reference.h"

using namespace sparse;
using check::same_bits;

namespace {

void check_problem(Problem& p, const Pattern& pattern, const std::string& what) {
  const Reference<double> exact(p, pattern.rows);
  const Reference<float> plain(p, pattern.rows);
  check::for_each_isa([&](const std::string&) {
    p.forward(pattern.view);
    CHECK_BUDGET(what + ": out", p.out, exact.out, plain.out);
    CHECK_BUDGET(what + ": lse", p.lse, exact.lse, plain.lse);
  });
}

template <class... Numbers>
std::string named(const char* name, Numbers... numbers) {
  std::string text = name;
  for (int64_t x : {int64_t(numbers)...}) text += " " + std::to_string(x);
  return text;
}

void set_row(Array& a, int64_t i, double x) {
  const int64_t dim = a.view.shape[a.view.rank - 1];
  for (int64_t c = 0; c < dim; ++c) a.set(i * dim + c, x);
}

/// Rows [begin, end) of two results, each of `dim` elements, are the same, and none is NaN.
bool same_rows(const Array& a, const Array& b, int64_t begin, int64_t end, int64_t dim) {
  bool same = true;
  for (int64_t i = begin * dim; i < end * dim; ++i) same &= a.get(i) == b.get(i);
  return same;
}

bool same_results(const Problem& a, const Problem& b) {
  return same_bits(a.out.floats(), b.out.floats()) && same_bits(a.lse.floats(), b.lse.floats());
}

}  // namespace

TEST(dims) {
  for (int64_t d : {1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 64, 100, 128})
    for (int64_t e : {1, 3, 7, 16, 17, 31, 64, 65, 100, 130}) {
      Problem p({1, 2, 1, 5, 23, d, e});
      check_problem(p, index_pattern(p.s, 2, 19), named("dims", d, e));
    }
  Problem p({1, 1, 1, 3, 40, 512, 512});
  check_problem(p, index_pattern(p.s, 1, 30), "dims 512");
}

TEST(lists_of_indices) {
  for (int64_t slots : {1, 15, 16, 17, 64, 255, 256, 257, 300, 1100})
    for (bool log_weights : {false, true}) {
      Sizes s = {2, 2, 1, 4, 90, 12, 20};
      s.log_weights = log_weights;
      Problem p(s);
      check_problem(p, index_pattern(s, 2, slots), named("slots", slots, log_weights));
    }
}

TEST(csr) {
  for (bool log_weights : {false, true})
    for (bool narrow : {false, true})
      for (int64_t n : {3, 100}) {
        Sizes s = {2, 2, 1, n, 700, 16, 8};
        s.log_weights = log_weights;
        Problem p(s);
        const Rows rows = random_rows(s, {5, 0, 1, 255, 256, 257, 700, 512});
        check_problem(p, csr_pattern(rows, log_weights, narrow), named("csr", log_weights, narrow, n));
      }
}

TEST(blocks) {
  int index = 0;
  for (int64_t columns : {1, 7, 8, 63, 64, 65, 130, 500})
    for (Seen seen : {Seen::all, Seen::causal, Seen::random})
      for (bool positions : {false, true}) {
        const int64_t cap = index % 3 == 0 ? 2 : 1 << 20, n = index % 2 ? 9 : 70;
        const double density = columns == 1 ? 0.7 : index % 5 == 0 ? 0.9 : 0.2;
        Problem p({2, 2, 2, n, 300, 8, 12});
        check_problem(p, block_pattern(p.s, columns, density, cap, seen, positions), named("blocks", columns, index++));
      }
}

TEST(factors_contexts_dtypes) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (Layout layout : {Layout::dense, Layout::loose})
      for (int64_t context_rows : {0, 1, 21})
        for (int form : {0, 1, 2}) {
          Sizes s = {2, 4, form == 2 ? 4 : 2, 21, 60, 24, 19, dtype, layout, true, context_rows, form < 2};
          Problem p(s);
          const Pattern pattern = form == 0   ? index_pattern(s, 2, 9)
                                  : form == 1 ? csr_pattern(random_rows(s, {9, 0, 30}), true, true)
                                              : block_pattern(s, 20, 0.1, 2, Seen::causal, false);
          check_problem(p, pattern, named("dtypes", int(dtype), int(layout), context_rows, form));
        }
}

TEST(one_matrix_in_three_forms_gives_the_same_bits) {
  for (int64_t n : {6, 80}) {
    for (Seen seen : {Seen::all, Seen::causal}) {
      const Sizes s = {2, 2, 1, n, 900, 40, 24};
      const Pattern blocks = block_pattern(s, 50, 0.5, 1 << 20, seen, false);
      const Pattern csr = csr_pattern(blocks.rows, false, false), lists = padded_pattern(s, blocks.rows);
      check::for_each_isa([&](const std::string&) {
        Problem a(s), b(s), c(s);
        a.forward(blocks.view), b.forward(csr.view), c.forward(lists.view);
        CHECK(same_results(a, b) && same_results(a, c));
      });
    }
  }
}

TEST(groups_share_indices) {
  for (int64_t heads_kv : {1, 2, 4, 12})
    for (int64_t n : {2, 70}) {
      Sizes s = {2, 12, heads_kv, n, 80, 64, 33, DType::f32, Layout::dense, true, 0, true};
      for (int64_t heads : {int64_t(1), heads_kv, int64_t(12)}) {
        const Pattern lists = index_pattern(s, heads, 40);
        Problem p(s);
        check_problem(p, lists, named("groups", heads_kv, heads, n));
        // The same lists given for every head.
        Pattern all;
        for (int64_t r = 0; r < 2 * 12 * n; ++r) {
          const int64_t row = (r / n / 12 * heads + r / n % 12 / (12 / heads)) * n + r % n;
          all.indices.insert(all.indices.end(), lists.indices.begin() + row * 40,
                             lists.indices.begin() + row * 40 + 40);
        }
        all.view.indices = make_tensor(static_cast<const int32_t*>(all.indices.data()), {2, 12, n, 40});
        SparsePattern bare = lists.view;
        bare.log_weights = {};
        check::for_each_isa([&](const std::string&) {
          Problem shared(s), apart(s);
          shared.forward(bare), apart.forward(all.view);
          CHECK(same_results(shared, apart));
        });
      }
    }
}

TEST(a_row_alone_gives_the_same_bits) {
  for (int form : {0, 1, 2}) {
    const Sizes many = {1, 1, 1, 200, 1500, 16, 20};
    const Pattern pattern = form == 0   ? index_pattern(many, 1, 700)
                            : form == 1 ? csr_pattern(random_rows(many, {700, 3, 1500, 0, 257}), false, false)
                                        : block_pattern(many, 30, 0.6, 1 << 20, Seen::random, true);
    check::for_each_isa([&](const std::string&) {
      Problem all(many);
      all.forward(pattern.view);
      for (int64_t n : {0, 1, 2, 3, 4, 117}) {
        Problem one({1, 1, 1, 1, 1500, 16, 20});
        for (int64_t c = 0; c < 16; ++c) one.q.set(c, all.q.values[size_t(n * 16 + c)]);
        for (int64_t i = 0; i < all.k.size(); ++i) one.k.set(i, all.k.values[size_t(i)]);
        for (int64_t i = 0; i < all.v.size(); ++i) one.v.set(i, all.v.values[size_t(i)]);
        SparsePattern view = pattern.view;
        const int64_t own[2] = {0, form == 1 ? int64_t(pattern.rows[size_t(n)].size()) : 0};
        if (form == 0) view.indices = make_tensor(pattern.indices.data() + n * 700, {1, 1, 1, 700});
        if (form == 1) {
          view.indptr = make_tensor(own, {2});
          view.indices = make_tensor(pattern.indices.data() + pattern.indptr[size_t(n)], {own[1]});
        }
        if (form == 2) {
          view.bits = make_tensor(pattern.bits.data() + n * 4, {1, 1, 1, 4});
          view.visible = make_tensor(pattern.visible.data() + n, {1, 1});
        }
        for (int threads : {1, 2, 16}) {
          one.forward(view, threads);
          CHECK(same_bits({one.lse.get(0)}, {all.lse.get(n)}));
          for (int64_t c = 0; c < 20; ++c) CHECK(same_bits({one.out.get(c)}, {all.out.get(n * 20 + c)}));
        }
      }
    });
  }
}

TEST(keys_outside_the_pattern_have_no_effect) {
  for (double bad : {double(NAN), kInfinity}) {
    for (int form : {0, 1, 2}) {
      for (int64_t n : {3, 70}) {
        Sizes s = {1, 2, 1, n, 400, 20, 18, DType::f32, Layout::dense, true, n, form < 2};
        const Pattern pattern = form == 0   ? index_pattern(s, 1, 60)
                                : form == 1 ? csr_pattern(random_rows(s, {40, 0, 300}), true, false)
                                            : block_pattern(s, 30, 0.3, 5, Seen::causal, false);
        check::for_each_isa([&](const std::string&) {
          for (int64_t r : {0, 1, 2}) {
            Problem zero(s), changed(s);
            std::vector<char> has(400, 0);
            for (const Entry& entry : pattern.rows[size_t(r)]) has[size_t(entry.key)] |= entry.log_weight > -kInfinity;
            for (int64_t m = 0; m < 400; ++m)
              if (!has[size_t(m)]) set_row(changed.k, m, bad), set_row(changed.v, m, bad);
            zero.forward(pattern.view), changed.forward(pattern.view);
            CHECK(same_rows(zero.out, changed.out, r, r + 1, 18) && same_rows(zero.lse, changed.lse, r, r + 1, 1));
          }
        });
      }
    }
  }
}

TEST(nan_and_infinity_reach_the_rows_that_see_them) {
  const Sizes s = {1, 1, 1, 40, 600, 9, 20};
  const Pattern pattern = csr_pattern(random_rows(s, {300, 20}), false, false);
  check::for_each_isa([&](const std::string&) {
    for (int64_t key : {5, 599}) {
      Problem keys(s), values(s);
      keys.k.set(key * 9 + 8, NAN), values.v.set(key * 20 + 19, NAN);
      keys.forward(pattern.view), values.forward(pattern.view);
      for (int64_t n = 0; n < 40; ++n) {
        bool sees = false;
        for (const Entry& entry : pattern.rows[size_t(n)]) sees |= entry.key == key;
        CHECK(std::isnan(keys.lse.get(n)) == sees && std::isnan(keys.out.get(n * 20)) == sees);
        CHECK(std::isnan(values.out.get(n * 20 + 19)) == sees && !std::isnan(values.out.get(n * 20 + 18)));
      }
    }
    Problem query(s), lone({1, 1, 1, 1, 1, 9, 20});
    set_row(query.q, 3, NAN), lone.k.set(8, NAN);
    query.forward(pattern.view);
    for (int64_t n = 0; n < 40; ++n) CHECK(std::isnan(query.out.get(n * 20)) == (n == 3));
    const Pattern one = csr_pattern({{{0, 0}}}, false, false);
    lone.forward(one.view);
    CHECK(std::isnan(lone.out.get(0)) && std::isnan(lone.lse.get(0)));
  });
}

TEST(causal_rows_depend_on_no_later_token) {
  const Sizes s = {1, 2, 2, 90, 90, 10, 12};
  const Pattern pattern = block_pattern(s, 16, 0.6, 1 << 20, Seen::causal, false);
  check::for_each_isa([&](const std::string&) {
    for (double changed : {3.0, double(NAN)})
      for (int64_t token : {83, 41}) {
        Problem before(s), after(s);
        for (int64_t h : {0, 1}) set_row(after.k, h * 90 + token, changed), set_row(after.v, h * 90 + token, changed);
        before.forward(pattern.view), after.forward(pattern.view);
        for (int64_t h : {0, 90}) {
          CHECK(same_rows(before.out, after.out, h, h + token, 12));
          CHECK(same_rows(before.lse, after.lse, h, h + token, 1));
        }
        CHECK(!same_rows(before.out, after.out, token, 90, 12));
      }
  });
}

TEST(rows_of_no_weight) {
  const Sizes s = {1, 1, 1, 8, 30, 6, 5, DType::f32, Layout::dense, true, 1, true};
  Rows rows = random_rows(s, {0, 4});
  for (size_t r = 0; r < rows.size(); ++r)
    for (Entry& entry : rows[r])
      if (r < 5) entry.log_weight = -kInfinity;
  Problem p(s);
  p.keep.assign(8, 1), p.keep[1] = p.keep[7] = 0;
  for (int64_t n : {0, 2}) p.row_scale.set(n, NAN);
  check::for_each_isa([&](const std::string&) {
    p.forward(csr_pattern(rows, true, false).view);
    for (int64_t i = 0; i < 40; ++i) {
      const int64_t n = i / 5;
      if (n < 5 || n == 6 || n == 7) CHECK(p.lse.get(n) == -kInfinity);
      const float context = float(1 - float(p.mix.values[size_t(n)])) * float(p.context.values[size_t(i % 5)]);
      if (!p.keep[size_t(n)])
        CHECK(p.out.get(i) == 0.0f);
      else if (n < 5 || n == 6)
        CHECK(p.out.get(i) == context);
    }
    CHECK(p.lse.get(5) > -kInfinity);
  });
}

TEST(huge_norms) {
  for (double spread : {30.0, 300.0, 1e4, 1e9, 1e18}) {
    Sizes s = {1, 1, 1, 20, 700, 8, 6};
    for (bool log_weights : {false, true}) {
      s.log_weights = log_weights;
      Problem p(s);
      for (int64_t i = 0; i < p.q.size(); ++i) p.q.set(i, p.q.values[size_t(i)] * spread);
      check_problem(p, csr_pattern(random_rows(s, {600, 7}), log_weights, false), named("huge", int64_t(spread)));
    }
  }
}

TEST(strides_and_threads_do_not_change_bits) {
  check::for_each_isa([](const std::string&) {
    for (int form : {0, 1, 2})
      for (int64_t n : {5, 300}) {
        Sizes s = {2, 4, 2, n, 600, 20, 12, DType::f32, Layout::dense, true, n, form < 2};
        const auto make = [&] {
          return form == 0   ? index_pattern(s, 2, 520)
                 : form == 1 ? csr_pattern(random_rows(s, {30, 0, 600}), true, false)
                             : block_pattern(s, 30, 0.4, 16, Seen::random, true);
        };
        Problem one(s);
        one.forward(make().view, 1);
        s.layout = Layout::loose;
        const Pattern pattern = make();
        for (int threads : {1, 2, 3, 16}) {
          Problem other(s);
          other.forward(pattern.view, threads);
          CHECK(same_results(one, other));
        }
      }
  });
}

TEST(strides_of_zero_and_below) {
  const Sizes s = {1, 2, 2, 20, 30, 5, 6};
  Pattern lists = index_pattern(s, 2, 11), same = index_pattern(s, 2, 11);
  for (int64_t i = 0; i < 440; ++i) same.indices[size_t(i)] = lists.indices[size_t(11 * (19 - i / 11 % 20) + i % 11)];
  lists.view.indices.data = lists.indices.data() + 19 * 11;
  lists.view.indices.stride[1] = 0, lists.view.indices.stride[2] = -11;
  check::for_each_isa([&](const std::string&) {
    Problem p(s), q(s);
    for (int64_t i = 0; i < 150; ++i) q.k.set(150 + i, p.k.values[size_t(i)]);
    p.k.view.stride[1] = 0;
    p.forward(lists.view), q.forward(same.view);
    CHECK(same_results(p, q));
  });
}

TEST(empty) {
  check::for_each_isa([](const std::string&) {
    for (const Sizes& s : {Sizes{0, 2, 1, 5, 7, 4, 3}, Sizes{1, 0, 0, 5, 7, 4, 3}, Sizes{1, 2, 1, 0, 7, 4, 3},
                           Sizes{1, 2, 1, 5, 0, 4, 3}, Sizes{1, 2, 1, 5, 7, 4, 3}}) {
      const Rows rows(size_t(s.b * s.h * s.n));
      const Pattern csr = csr_pattern(rows, false, false), lists = index_pattern(s, s.h, s.m ? 0 : 3);
      const Pattern blocks = block_pattern(s, 9, s.m ? 0 : 1, 2, Seen::all, false);
      for (const Pattern* pattern : {&csr, &lists, &blocks}) {
        Problem p(s);
        p.forward(pattern->view);
        for (int64_t i = 0; i < p.out.size(); ++i) CHECK(p.out.get(i) == 0.0f && p.lse.get(i / 3) == -kInfinity);
      }
    }
  });
}

TEST(the_size_of_the_workspace_depends_on_no_data) {
  const Sizes s = {1, 2, 1, 3, 5000, 16, 16};
  Problem p(s);
  const Queue queue = Queue::cpu(2);
  for (int form : {0, 1, 2}) {
    const Pattern pattern = form == 0   ? index_pattern(s, 2, 700)
                            : form == 1 ? csr_pattern(random_rows(s, {4000}), false, false)
                                        : block_pattern(s, 30, 0.6, 1 << 20, Seen::random, true);
    SparsePattern away = pattern.view;
    for (ConstTensor* t : {&away.indices, &away.indptr, &away.bits, &away.visible, &away.positions})
      if (t->defined()) t->data = reinterpret_cast<const void*>(uintptr_t(4096));
    const auto bytes = [&](const SparsePattern& view) {
      return sparse_attention_workspace_bytes(queue, p.q.view, p.k.view, p.v.view, view, {}, p.out.view, p.lse.view);
    };
    CHECK(bytes(away) == bytes(pattern.view));
  }
}
