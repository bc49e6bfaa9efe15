// The gradient of sparse_attention against its equations in double and central differences, on every row of kernels.
#include "sparse_attention_bwd_reference.h"
#include "subquad/error.h"

using namespace sparse;
using check::same_bits;

namespace {

/// Element by element the less exact of two results.
std::vector<double> worse(const std::vector<double>& exact, const std::vector<double>& a,
                          const std::vector<double>& b) {
  std::vector<double> result;
  for (size_t i = 0; i < exact.size(); ++i)
    result.push_back(std::fabs(a[i] - exact[i]) > std::fabs(b[i] - exact[i]) ? a[i] : b[i]);
  return result;
}

/// The plain formula is summed in two orders, so that its error is not small by luck.
void check_problem(Backward& p, const Pattern& pattern, const std::string& what) {
  const GradientReference<double> exact(p, pattern.rows);
  const GradientReference<float> one(p, pattern.rows), other(p, pattern.rows, true);
  check::for_each_isa([&](const std::string&) {
    p.run(pattern);
    CHECK_BUDGET(what + ": dq", p.dq, exact.dq, worse(exact.dq, one.dq, other.dq));
    CHECK_BUDGET(what + ": dk", p.dk, exact.dk, worse(exact.dk, one.dk, other.dk));
    CHECK_BUDGET(what + ": dv", p.dv, exact.dv, worse(exact.dv, one.dv, other.dv));
    CHECK_BUDGET(what + ": drow_scale", p.drow_scale, exact.drow_scale,
                 worse(exact.drow_scale, one.drow_scale, other.drow_scale));
    CHECK_BUDGET(what + ": dmix", p.dmix, exact.dmix, worse(exact.dmix, one.dmix, other.dmix));
    CHECK_BUDGET(what + ": dcontext", p.dcontext, exact.dcontext, worse(exact.dcontext, one.dcontext, other.dcontext));
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

/// Whether row i of a result is 0, and whether it has a NaN.
bool is_zero(const Array& a, int64_t i, int64_t dim) {
  bool zero = true;
  for (int64_t c = i * dim; c < (i + 1) * dim; ++c) zero &= a.get(c) == 0.0f;
  return zero;
}

bool has_nan(const Array& a, int64_t i, int64_t dim) {
  bool found = false;
  for (int64_t c = i * dim; c < (i + 1) * dim; ++c) found |= std::isnan(a.get(c));
  return found;
}

/// sum of dout * out and dlse * lse, a row without an entry left out of the second.
double loss(const Backward& p, const Rows& rows) {
  const Reference<double> forward(p, rows);
  double sum = 0;
  for (size_t i = 0; i < forward.out.size(); ++i) sum += p.dout.values[i] * forward.out[i];
  for (size_t i = 0; i < forward.lse.size(); ++i)
    if (p.with_dlse && forward.lse[i] != -kInfinity) sum += p.dlse.values[i] * forward.lse[i];
  return sum;
}

/// The gradient in double against differences of the loss.
void check_slopes(Backward& p, const Rows& rows, Array& x, const std::vector<double>& gradient) {
  for (size_t i = 0; i < x.values.size(); ++i) {
    const double kept = x.values[i], step = 1e-4;
    x.values[i] = kept + step;
    const double above = loss(p, rows);
    x.values[i] = kept - step;
    const double below = loss(p, rows);
    x.values[i] = kept;
    CHECK_NEAR(gradient[i], (above - below) / (2 * step), 1e-6);
  }
}

}  // namespace

TEST(dims) {
  for (int64_t d : {1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 64, 100, 128})
    for (int64_t e : {1, 3, 7, 16, 17, 31, 64, 65, 100, 130}) {
      Backward p({2, 2, 1, 50, 60, d, e});
      check_problem(p, index_pattern(p.s, 2, 19), named("dims", d, e));
    }
  Backward p({1, 1, 1, 3, 40, 512, 512});
  check_problem(p, index_pattern(p.s, 1, 30), "dims 512");
}

TEST(lists_of_indices) {
  for (int64_t slots : {1, 15, 16, 17, 64, 511, 512, 513, 1100})
    for (bool log_weights : {false, true}) {
      Sizes s = {2, 2, 1, 4, 90, 12, 20};
      s.log_weights = log_weights;
      Backward p(s, log_weights);
      check_problem(p, index_pattern(s, 2, slots), named("slots", slots, log_weights));
    }
}

TEST(heads_of_indices) {
  for (int64_t hkv : {1, 2, 6})
    for (int64_t heads : {int64_t(1), hkv, int64_t(6)})
      for (Layout layout : {Layout::dense, Layout::loose}) {
        Sizes s = {2, 6, hkv, 7, 30, 9, 18, DType::f32, layout, true, 7, true};
        Backward p(s, true);
        check_problem(p, index_pattern(s, heads, 12), named("heads", hkv, heads, int(layout)));
      }
}

TEST(csr) {
  for (bool narrow : {false, true})
    for (bool log_weights : {false, true})
      for (int64_t hkv : {1, 4}) {
        Sizes s = {2, 4, hkv, 9, 70, 16, 24, DType::f32, Layout::loose, true, 1, log_weights};
        Backward p(s, narrow);
        check_problem(p, csr_pattern(random_rows(s, {0, 1, 16, 33, 70}), log_weights, narrow),
                      named("csr", narrow, log_weights, hkv));
      }
}

TEST(blocks) {
  for (bool positions : {false, true})
    for (Seen seen : {Seen::all, Seen::causal, Seen::random})
      for (int64_t columns : {1, 7, 64, 130})
        for (int64_t cap : {1, 4, 1000}) {
          Sizes s = {2, 2, 2, 60, 90, 8, 16, DType::f32, Layout::dense, columns == 64, columns == 64 ? 60 : 0};
          Backward p(s);
          check_problem(p, block_pattern(s, columns, 0.3, cap, seen, positions),
                        named("blocks", positions, int(seen), columns, cap));
        }
}

TEST(dtypes_and_layouts) {
  for (DType dtype : {DType::f16, DType::bf16})
    for (Layout layout : {Layout::dense, Layout::loose})
      for (bool f32_gradients : {false, true}) {
        Sizes s = {2, 4, 2, 11, 50, 20, 40, dtype, layout, true, 1, true};
        Backward p(s, true, f32_gradients);
        check_problem(p, index_pattern(s, 2, 24), named("dtypes", int(dtype), int(layout), f32_gradients));
      }
}

// Many rows of one key: more than are added up at once; and every piece of a list of many keys.
TEST(long_lists) {
  Sizes s = {1, 2, 1, 1300, 40, 5, 6};
  Backward p(s, true);
  Pattern one = index_pattern(s, 1, 3, 1, 0);
  for (size_t i = 0; i < one.indices.size(); i += 3) one.indices[i] = 11;
  for (auto& row : one.rows) row[0].key = 11;
  check_problem(p, one, "one key");
  Backward wide({1, 1, 1, 3, 2100, 7, 9});
  check_problem(wide, csr_pattern(random_rows(wide.s, {2100, 513, 1024}), false, true), "wide");
}

TEST(large_logits) {
  for (double size : {1e2, 1e4}) {
    Backward p({1, 1, 1, 6, 20, 8, 8});
    for (int64_t i = 0; i < p.q.size(); ++i) p.q.set(i, size * p.q.values[size_t(i)]);
    check_problem(p, index_pattern(p.s, 1, 15), named("logits", int64_t(size)));
  }
}

TEST(central_differences) {
  for (int64_t context_rows : {1, 4}) {
    Sizes s = {1, 4, 2, 4, 9, 3, 2, DType::f32, Layout::dense, true, context_rows, true};
    Backward p(s, true);
    const Pattern pattern = index_pattern(s, 2, 6);
    const GradientReference<double> exact(p, pattern.rows);
    check_slopes(p, pattern.rows, p.q, exact.dq), check_slopes(p, pattern.rows, p.k, exact.dk);
    check_slopes(p, pattern.rows, p.v, exact.dv);
    check_slopes(p, pattern.rows, p.row_scale, exact.drow_scale), check_slopes(p, pattern.rows, p.mix, exact.dmix);
    check_slopes(p, pattern.rows, p.context, exact.dcontext);
  }
}

TEST(forms_of_one_matrix) {
  const Sizes s = {2, 2, 1, 30, 64, 16, 12};
  const Pattern blocks = block_pattern(s, 16, 0.4, 3, Seen::causal, true);
  const Pattern csr = csr_pattern(blocks.rows, false, false), narrow = csr_pattern(blocks.rows, false, true);
  const Pattern lists = padded_pattern(s, blocks.rows);
  check::for_each_isa([&](const std::string&) {
    Backward p(s);
    p.run(csr);
    const std::vector<float> expected = p.results();
    for (const Pattern* pattern : {&blocks, &narrow, &lists}) {
      p.run(*pattern);
      CHECK(same_bits(p.results(), expected));
    }
  });
}

TEST(threads_do_not_change_bits) {
  for (int64_t heads : {1, 3}) {
    const Sizes s = {1, heads, 1, 333, 150, 17, 20, DType::f32, Layout::dense, true, 1};
    const Pattern lists = index_pattern(s, 1, 24), csr = csr_pattern(random_rows(s, {0, 3, 50}), false, true);
    const Pattern blocks = block_pattern(s, 40, 0.2, 2, Seen::causal, false);
    check::for_each_isa([&](const std::string&) {
      for (const Pattern* pattern : {&lists, &csr, &blocks}) {
        Backward p(s, true);
        p.run(*pattern, 1);
        const std::vector<float> expected = p.results();
        for (int threads : {2, 3, 16}) {
          p.run(*pattern, threads);
          CHECK(same_bits(p.results(), expected));
        }
      }
    });
  }
}

// Masked queries, entries of weight 0 and keys without an entry may hold anything.
TEST(what_does_not_count_has_no_effect) {
  Sizes s = {2, 2, 2, 20, 40, 10, 9, DType::f32, Layout::dense, true, 20, true};
  Pattern pattern = index_pattern(s, 2, 8);
  Backward clean(s, true), dirty(s, true);
  std::vector<bool> used(size_t(s.b * s.hkv * s.m));
  for (int64_t r = 0; r < s.b * s.h * s.n; ++r) {
    for (const Entry& entry : pattern.rows[size_t(r)])
      if (clean.kept(r) && entry.log_weight != -kInfinity) used[size_t(r / s.n * s.m + entry.key)] = true;
    if (clean.kept(r)) continue;
    for (Array* a : {&dirty.q, &dirty.dout, &dirty.context}) set_row(*a, r, NAN);
    for (Array* a : {&dirty.row_scale, &dirty.mix, &dirty.dlse}) a->set(r, NAN);
  }
  int64_t unused = 0;
  for (int64_t key = 0; key < s.b * s.hkv * s.m; ++key)
    if (!used[size_t(key)]) ++unused, set_row(dirty.k, key, NAN), set_row(dirty.v, key, NAN);
  CHECK(unused > 5);
  check::for_each_isa([&](const std::string&) {
    clean.run(pattern), dirty.run(pattern);
    CHECK(same_bits(clean.results(), dirty.results()));
    for (float x : dirty.results()) CHECK(std::isfinite(x));
    for (int64_t key = 0; key < s.b * s.hkv * s.m; ++key)
      CHECK((is_zero(dirty.dk, key, s.d) && is_zero(dirty.dv, key, s.e)) == !used[size_t(key)]);
  });
}

TEST(a_row_reaches_its_own_keys_only) {
  const Sizes s = {1, 2, 1, 12, 50, 6, 7};
  const Pattern pattern = csr_pattern(random_rows(s, {3, 5}), false, false);
  Backward p(s);
  set_row(p.dout, 17, NAN);
  check::for_each_isa([&](const std::string&) {
    p.run(pattern);
    for (int64_t r = 0; r < 24; ++r) CHECK(has_nan(p.dq, r, s.d) == (r == 17));
    for (int64_t key = 0; key < s.m; ++key) {
      bool own = false;
      for (const Entry& entry : pattern.rows[17]) own |= entry.key == key;
      CHECK(has_nan(p.dk, key, s.d) == own && has_nan(p.dv, key, s.e) == own);
    }
  });
}

TEST(rows_without_entries) {
  Sizes s = {1, 1, 1, 5, 9, 4, 3, DType::f32, Layout::dense, true, 1};
  Backward p(s, true);
  check_problem(p, csr_pattern(Rows(5), false, false), "no entries");
  s.log_weights = true;
  Pattern nothing = index_pattern(s, 1, 4);
  for (int64_t i = 0; i < nothing.log_weights.size(); ++i) nothing.log_weights.set(i, -kInfinity);
  for (auto& row : nothing.rows) row.clear();
  check_problem(p, nothing, "no weight");
}

TEST(empty) {
  const Sizes sizes[] = {{0, 2, 1, 3, 4, 5, 6},
                         {2, 0, 0, 3, 4, 5, 6},
                         {2, 2, 1, 0, 4, 5, 6},
                         {2, 2, 1, 0, 4, 5, 6, DType::f32, Layout::dense, true, 1},
                         {2, 2, 1, 3, 0, 5, 6}};
  check::for_each_isa([&](const std::string&) {
    for (const Sizes& s : sizes) {
      Backward p(s, true);
      for (int64_t slots : {0, 3}) p.run(index_pattern(s, s.h, slots));
      p.run(csr_pattern(Rows(size_t(s.b * s.h * s.n)), false, true));
      p.run(block_pattern(s, 9, 0.5, 2, Seen::all, false));
      for (float x : p.results()) CHECK(x == 0.0f);
    }
  });
}

TEST(errors) {
  const Sizes s = {1, 2, 1, 3, 9, 6, 5, DType::f32, Layout::dense, true, 1};
  const Pattern lists = index_pattern(s, 2, 7), blocks = block_pattern(s, 9, 0.9, 3, Seen::all, false);
  const auto with = [&](const Pattern& pattern, auto change) {
    Backward p(s, true);
    change(p);
    p.run(pattern.view);
  };
  int64_t entries = 0;
  for (const auto& row : blocks.rows) entries += int64_t(row.size());
  with(blocks, [&](Backward& p) { p.options.max_entries = entries; });
  CHECK_THROWS(with(blocks, [&](Backward& p) { p.options.max_entries = entries - 1; }),
               "[sparse_attention_bwd] max_entries: expected at least " + std::to_string(entries) + ", got " +
                   std::to_string(entries - 1));
  CHECK_THROWS(with(blocks, [](Backward& p) { p.options.max_entries = -1; }),
               "[sparse_attention_bwd] max_entries: expected a value of at least 0, got -1");
  CHECK_THROWS(with(lists, [](Backward& p) { p.dout.view.shape[2] = 4; }),
               "[sparse_attention_bwd] dout: expected shape [B, H, N, E] = [1, 2, 3, 5], got [1, 2, 4, 5]");
  CHECK_THROWS(with(lists, [](Backward& p) { p.dlse.view.shape[1] = 1; }),
               "[sparse_attention_bwd] dlse: expected shape [B, H, N] = [1, 2, 3], got [1, 1, 3]");
  CHECK_THROWS(with(lists, [](Backward& p) { p.dk.view.shape[2] = 8; }),
               "[sparse_attention_bwd] dk: expected shape [B, H, N, D] = [1, 1, 9, 6], got [1, 1, 8, 6]");
  CHECK_THROWS_AS(TypeMismatch, with(lists, [](Backward& p) { p.dv.view = {}; }),
                  "[sparse_attention_bwd] dv: expected an array, got none");
  CHECK_THROWS_AS(TypeMismatch, with(lists, [](Backward& p) { p.options.context = {}; }),
                  "[sparse_attention_bwd] context: expected an array where dcontext is wanted, got none");
  CHECK_THROWS(with(lists, [](Backward& p) { p.dmix.view = p.drow_scale.view; }),
               "[sparse_attention_bwd] dmix: expected an output that shares no memory with another argument");
  CHECK_THROWS(with(lists, [](Backward& p) { p.dq.view = p.q.view; }),
               "[sparse_attention_bwd] dq: expected an output that shares no memory with another argument");
  Pattern wrong = index_pattern(s, 2, 7);
  wrong.indices[3] = 9;
  CHECK_THROWS(with(wrong, [](Backward&) {}),
               "[sparse_attention_bwd] indices: expected keys in [0, 9), or -1 for none, got 9 at [0, 0, 0, 3]");
  Backward p(s);
  CHECK_THROWS(sparse_attention_bwd(Queue::cpu(1), p.dout.view, {}, p.q.view, p.k.view, p.v.view, lists.view, p.options,
                                    p.gradients(), {}),
               "[sparse_attention_bwd] workspace: expected at least ");
}
