#include "arrays.h"
#include "subquad/error.h"
#include "subquad/segment_mean.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

struct Sizes {
  int64_t batch, heads, seq, dim, num_segments, segment_size;
  bool masked = false;
  int64_t seq_paired = -1;  // no paired mask
  Layout layout = Layout::dense;
  DType dtype = DType::f32;
};

struct Problem {
  Sizes s;
  int64_t segments;
  std::vector<char> keep, paired;  // paired holds one item after the other
  SegmentMeanOptions options;
  Array x, dout, base;

  explicit Problem(const Sizes& sizes)
      : s(sizes),
        segments(s.segment_size ? (s.seq + s.segment_size - 1) / s.segment_size : s.num_segments),
        x({s.batch, s.heads, s.seq, s.dim}, s.dtype, s.layout),
        dout({s.batch, s.heads, segments, s.dim}, s.dtype, s.layout),
        base({s.batch, s.heads, s.seq, s.dim}, DType::f16, s.layout) {
    std::mt19937 random(5);
    x.fill_normal(random), dout.fill_normal(random), base.fill_normal(random);
    keep.assign(size_t(s.batch * s.seq), 1);
    if (s.masked)
      for (size_t i = 0; i < keep.size(); ++i) keep[i] = random() % 3 != 0;
    // One item without any token, if there are several.
    if (s.masked && s.batch > 1) std::fill(keep.begin() + s.seq, keep.begin() + 2 * s.seq, 0);
    options.num_segments = s.num_segments, options.segment_size = s.segment_size;
    const auto as_bool = [](const std::vector<char>& v) { return reinterpret_cast<const bool*>(v.data()); };
    if (s.masked) options.mask = make_tensor(as_bool(keep), {s.batch, s.seq});
    if (s.seq_paired >= 0) {
      for (int64_t i = 0; i < s.batch * s.seq_paired; ++i) paired.push_back(random() % 2);
      options.paired_mask = make_tensor(as_bool(paired), {s.batch, s.seq_paired});
    }
  }

  /// The tokens of each segment of item b.
  std::vector<std::vector<int64_t>> tokens(int64_t b) const {
    std::vector<std::vector<int64_t>> list(static_cast<size_t>(segments));
    std::vector<int64_t> valid;
    for (int64_t n = 0; n < s.seq; ++n)
      if (keep[size_t(b * s.seq + n)]) valid.push_back(n);
    if (s.segment_size > 0) {
      for (const int64_t n : valid) list[size_t(n / s.segment_size)].push_back(n);
      return list;
    }
    int64_t used = std::min(segments, int64_t(valid.size()));
    if (s.seq_paired >= 0) {
      const auto first = paired.begin() + b * s.seq_paired;
      used = std::min(used, int64_t(std::count(first, first + s.seq_paired, 1)));
    }
    if (used == 0) return list;
    const int64_t length = int64_t(valid.size()) / used, short_ones = (length + 1) * used - int64_t(valid.size());
    size_t next = 0;
    for (int64_t c = 0; c < used; ++c)
      for (int64_t i = 0; i < length + (c < short_ones ? 0 : 1); ++i) list[size_t(c)].push_back(valid[next++]);
    CHECK(next == valid.size());
    return list;
  }

  template <class T>
  std::vector<double> means() const {
    std::vector<double> out;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads; ++h)
        for (const std::vector<int64_t>& segment : tokens(b))
          for (int64_t d = 0; d < s.dim; ++d) {
            T sum = 0;
            for (const int64_t n : segment) sum += T(x.values[size_t(((b * s.heads + h) * s.seq + n) * s.dim + d)]);
            out.push_back(segment.empty() ? 0 : double(sum / T(segment.size())));
          }
    return out;
  }

  template <class T>
  std::vector<double> gradient(bool with_base) const {
    std::vector<double> dx(x.values.size());
    for (size_t i = 0; with_base && i < dx.size(); ++i) dx[i] = base.values[i];
    for (int64_t b = 0; b < s.batch; ++b) {
      const std::vector<std::vector<int64_t>> list = tokens(b);
      for (int64_t h = 0; h < s.heads; ++h)
        for (size_t c = 0; c < list.size(); ++c)
          for (const int64_t n : list[c])
            for (int64_t d = 0; d < s.dim; ++d) {
              double& to = dx[size_t(((b * s.heads + h) * s.seq + n) * s.dim + d)];
              const double from = dout.values[size_t(((b * s.heads + h) * segments + int64_t(c)) * s.dim + d)];
              to = double(T(to) + T(from) / T(list[c].size()));
            }
    }
    return dx;
  }

  /// Everything that must have no effect: masked tokens, gradients of segments without tokens.
  void poison() {
    for (int64_t i = 0; i < x.size(); ++i)
      if (!keep[size_t(i / (s.heads * s.seq * s.dim) * s.seq + i / s.dim % s.seq)]) x.set(i, NAN);
    for (int64_t b = 0; b < s.batch; ++b) {
      const std::vector<std::vector<int64_t>> list = tokens(b);
      for (int64_t i = 0; i < s.heads * segments * s.dim; ++i)
        if (list[size_t(i / s.dim % segments)].empty()) dout.set(b * s.heads * segments * s.dim + i, NAN);
    }
  }

  void forward(const Array& out, int32_t* counts, int threads) const {
    const Queue queue = Queue::cpu(threads);
    const Tensor sizes = counts ? make_tensor(counts, {s.batch, segments}) : Tensor();
    const int64_t bytes = segment_mean_workspace_bytes(queue, x.view, options, out.view, sizes);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    segment_mean(queue, x.view, options, out.view, sizes, {workspace.data(), bytes});
  }

  void backward(bool with_base, const Array& dx, int threads) const {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor added = with_base ? ConstTensor(base.view) : ConstTensor();
    const int64_t bytes = segment_mean_bwd_workspace_bytes(queue, dout.view, added, options, dx.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    segment_mean_bwd(queue, dout.view, added, options, dx.view, {workspace.data(), bytes});
  }
};

void check_problem(const Sizes& s) {
  Problem p(s);
  p.poison();
  const std::vector<double> exact = p.means<double>(), plain = p.means<float>();
  std::vector<float> first;
  for (const int threads : {1, 2, 3, 16}) {
    Array out({s.batch, s.heads, p.segments, s.dim}, s.dtype, s.layout);
    std::vector<int32_t> counts(size_t(s.batch * p.segments), -7);
    p.forward(out, threads == 3 ? nullptr : counts.data(), threads);
    CHECK_BUDGET("mean", out, exact, plain);
    for (int64_t i = 0; threads != 3 && i < s.batch * p.segments; ++i)
      CHECK(counts[size_t(i)] == int32_t(p.tokens(i / p.segments)[size_t(i % p.segments)].size()));
    if (threads == 1) first = out.floats();
    CHECK(check::same_bits(first, out.floats()));
  }
  for (const bool with_base : {false, true}) {
    const std::vector<double> exact_dx = p.gradient<double>(with_base), plain_dx = p.gradient<float>(with_base);
    for (const int threads : {1, 2, 3, 16}) {
      Array dx({s.batch, s.heads, s.seq, s.dim}, s.dtype, s.layout);
      p.backward(with_base, dx, threads);
      CHECK_BUDGET("gradient", dx, exact_dx, plain_dx);
      if (threads == 1) first = dx.floats();
      CHECK(check::same_bits(first, dx.floats()));
    }
  }
}

}  // namespace

TEST(matches_the_equations) {
  check::for_each_isa([](const std::string&) {
    for (const bool masked : {false, true})
      for (const Layout layout : {Layout::dense, Layout::loose}) {
        for (const int64_t dim : {1, 3, 7, 8, 16, 17, 33, 64}) {
          check_problem({2, 2, 29, dim, 7, 0, masked, -1, layout});
          check_problem({2, 2, 29, dim, 0, 7, masked, -1, layout});
        }
        for (const DType dtype : {DType::f16, DType::bf16}) {
          check_problem({3, 2, 31, 20, 8, 0, masked, 11, layout, dtype});
          check_problem({3, 2, 32, 20, 0, 8, masked, -1, layout, dtype});
        }
        check_problem({1, 1, 5, 512, 2, 0, masked, -1, layout});
        check_problem({2, 1, 700, 64, 49, 0, masked, 300, layout});
        check_problem({1, 2, 700, 64, 0, 100, masked, -1, layout});
      }
  });
}

TEST(any_numbers_of_tokens_and_segments) {
  check::for_each_isa([](const std::string&) {
    for (const bool masked : {false, true})
      for (const int64_t seq : {0, 1, 2, 9, 10})
        for (const int64_t count : {1, 2, 3, 8, 9, 10, 11, 25}) {
          check_problem({2, 1, seq, 2, count, 0, masked});
          check_problem({2, 1, seq, 2, 0, count, masked});
          for (const int64_t paired : {0, 1, 6, 30}) check_problem({2, 1, seq, 2, count, 0, masked, paired});
        }
  });
}

TEST(padding_changes_nothing) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 2, 23, 5, 4, 0}), longer({1, 2, 40, 5, 4, 0, true});
    std::fill(longer.keep.begin(), longer.keep.end(), 0);
    for (int64_t n = 0; n < 40; ++n) {
      const bool kept = n >= 3 && n % 3 != 2 && n < 37;
      longer.keep[size_t(n)] = kept;
    }
    const int64_t valid = std::count(longer.keep.begin(), longer.keep.end(), 1);
    CHECK(valid == 23);
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t n = 0, i = 0; n < 40; ++n)
        for (int64_t d = 0; d < 5; ++d) {
          const bool kept = longer.keep[size_t(n)];
          longer.x.set((h * 40 + n) * 5 + d, kept ? p.x.values[size_t((h * 23 + i) * 5 + d)] : NAN);
          if (kept && d == 4) ++i;
        }
    Array a({1, 2, 4, 5}, DType::f32), b({1, 2, 4, 5}, DType::f32);
    p.forward(a, nullptr, 1), longer.forward(b, nullptr, 2);
    CHECK(check::same_bits(a.floats(), b.floats()));
  });
}

TEST(central_differences) {
  check::for_each_isa([](const std::string&) {
    Problem p({1, 1, 11, 2, 4, 0, true});
    Array dx({1, 1, 11, 2}, DType::f32), out({1, 1, 4, 2}, DType::f32);
    p.backward(false, dx, 1);
    for (int64_t i = 0; i < p.x.size(); ++i) {
      const double x = p.x.values[size_t(i)];
      double loss[2] = {};
      for (const int side : {0, 1}) {
        p.x.set(i, x + (side ? 0.25 : -0.25));
        p.forward(out, nullptr, 1);
        for (int64_t j = 0; j < out.size(); ++j) loss[side] += double(out.get(j)) * p.dout.values[size_t(j)];
      }
      p.x.set(i, x);
      CHECK_NEAR(dx.get(i), (loss[1] - loss[0]) / 0.5, 4e-6);
    }
  });
}

TEST(counts_without_heads) {
  check::for_each_isa([](const std::string&) {
    int32_t counts[3] = {-1, -1, -1};
    Problem p({1, 0, 7, 2, 3, 0});
    p.forward(Array({1, 0, 3, 2}, DType::f32), counts, 1);
    CHECK(counts[0] == 2 && counts[1] == 2 && counts[2] == 3);
  });
}

TEST(counts_as_logarithms_and_as_ones) {
  check::for_each_isa([](const std::string&) {
    for (const bool unit : {false, true}) {
      Problem p({3, 2, 50, 3, 60, 0, true});
      if (unit) p.s.num_segments = p.segments = p.options.num_segments = 7;
      p.options.unit_counts = unit;
      const int64_t segments = p.segments;
      std::vector<float> logs(size_t(3 * segments), NAN);
      std::vector<int32_t> counts(size_t(3 * segments), -7);
      Array out({3, 2, segments, 3}, DType::f32), again({3, 2, segments, 3}, DType::f32);
      p.forward(out, counts.data(), 2);
      const Tensor view = make_tensor(logs.data(), {3, segments});
      const Queue queue = Queue::cpu(2);
      const int64_t bytes = segment_mean_workspace_bytes(queue, p.x.view, p.options, again.view, view);
      std::vector<char> workspace(static_cast<size_t>(bytes));
      segment_mean(queue, p.x.view, p.options, again.view, view, {workspace.data(), bytes});
      int64_t filled = 0;
      for (int64_t i = 0; i < 3 * segments; ++i) {
        const int32_t tokens = int32_t(p.tokens(i / segments)[size_t(i % segments)].size());
        filled += tokens > 0;
        CHECK(counts[size_t(i)] == (unit ? std::min(tokens, 1) : tokens));
        CHECK_NEAR(logs[size_t(i)], std::log(double(counts[size_t(i)])), 2e-7);
      }
      CHECK(filled > 0 && filled < 3 * segments);
      // What is written as counts does not enter the means.
      const std::vector<double> exact = p.means<double>(), plain = p.means<float>();
      CHECK_BUDGET("mean", out, exact, plain);
      CHECK(check::same_bits(out.floats(), again.floats()));
    }
  });
}

TEST(errors_name_what_is_wrong) {
  std::vector<float> x(6000), y(6000);
  bool mask[20] = {};
  char memory[1000];
  const Queue queue = Queue::cpu(1);
  const Workspace workspace = {memory, sizeof memory};
  const Tensor a = make_tensor(x.data(), {1, 2, 10, 4}), out = make_tensor(y.data(), {1, 2, 3, 4});
  const auto call = [&](SegmentMeanOptions options, const Tensor& in, const Tensor& result) {
    segment_mean(queue, in, options, result, Tensor(), workspace);
  };
  SegmentMeanOptions none, both, three, by_size;
  both.num_segments = 3, both.segment_size = 4, three.num_segments = 3, by_size.segment_size = 4;
  const std::string rule = "num_segments: expected one of num_segments and segment_size above 0 and the other 0, got ";
  CHECK_THROWS_AS(std::invalid_argument, call(none, a, out), "[segment_mean] " + rule + "0 and 0");
  CHECK_THROWS(call(both, a, out), rule + "3 and 4");
  both.num_segments = -3;
  CHECK_THROWS(call(both, a, out), rule + "-3 and 4");
  CHECK_THROWS(call(three, a, make_tensor(y.data(), {1, 2, 4, 4})),
               "[segment_mean] out: expected shape [B, H, C, D] = [1, 2, 3, 4], got [1, 2, 4, 4]");
  CHECK_THROWS(call(three, make_tensor(x.data(), {1, 2, 10, 0}), out), "[segment_mean] x: expected D of at least 1");
  CHECK_THROWS_AS(Unsupported,
                  call(three, make_tensor(x.data(), {1, 1, 4, 513}), make_tensor(y.data(), {1, 1, 3, 513})),
                  "a head dimension above 512");
  CHECK_THROWS(call(three, a, make_tensor(x.data() + 3, {1, 2, 3, 4})), "[segment_mean] out: expected an output that");
  CHECK_THROWS_AS(TypeMismatch, call(three, make_tensor(mask, {1, 1, 2, 4}), out), "[segment_mean] x: expected dtype");
  three.mask = make_tensor(mask, {1, 9});
  CHECK_THROWS(call(three, a, out), "[segment_mean] mask: expected shape [B, N] = [1, 10], got [1, 9]");
  by_size.paired_mask = make_tensor(mask, {1, 9});
  CHECK_THROWS(call(by_size, a, out), "[segment_mean] paired_mask: expected none together with segment_size, got an");
  three.mask = ConstTensor(), three.paired_mask = make_tensor(mask, {2, 9});
  CHECK_THROWS(call(three, a, out), "[segment_mean] paired_mask: expected shape [B, N']");
  three.paired_mask = ConstTensor();
  CHECK_THROWS(segment_mean(queue, a, three, out, Tensor(), {memory, 10}),
               "[segment_mean] workspace: expected at least");
  CHECK_THROWS(segment_mean_bwd(queue, out, make_tensor(y.data(), {1, 2, 9, 4}), three, a, workspace),
               "[segment_mean_bwd] base: expected shape [B, H, N, D] = [1, 2, 10, 4], got [1, 2, 9, 4]");
  CHECK_THROWS(segment_mean_bwd(queue, out, make_tensor(x.data(), {1, 2, 10, 4}), three, a, workspace),
               "[segment_mean_bwd] dx: expected an output that shares no memory");
}
