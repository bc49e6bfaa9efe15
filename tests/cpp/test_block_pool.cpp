#include <memory>
#include <random>

#include "arrays.h"
#include "check.h"
#include "subquad/block_pool.h"
#include "subquad/error.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

struct Case {
  int64_t batch, heads, seq_q, seq_k, dim, columns;
  bool masked;
  DType dtype = DType::f32;
  Layout layout = Layout::dense;
};

/// The arrays of a case; NaN behind the masks.
struct Inputs {
  Case c;
  Array v, probs, dout, base;
  std::unique_ptr<bool[]> keys, queries;

  explicit Inputs(const Case& c_)
      : c(c_),
        v({c.batch, c.heads, c.seq_k, c.dim}, c.dtype, c.layout),
        probs({c.batch, c.heads, c.seq_q, c.columns}, DType::f32, c.layout),
        dout({c.batch, c.heads, 1, c.dim}, c.dtype, c.layout),
        base({c.batch, c.heads, c.seq_k, c.dim}, DType::f32, c.layout),
        keys(new bool[size_t(c.batch * c.seq_k) + 1]),
        queries(new bool[size_t(c.batch * c.seq_q) + 1]) {
    std::mt19937 random(11);
    v.fill_normal(random), probs.fill_normal(random), dout.fill_normal(random), base.fill_normal(random);
    // The second item has no key, the third no query.
    for (int64_t i = 0; i < c.batch * c.seq_k; ++i) keys[size_t(i)] = random() % 3 != 0 && i / c.seq_k != 1;
    for (int64_t i = 0; i < c.batch * c.seq_q; ++i) queries[size_t(i)] = random() % 3 != 0 && i / c.seq_q != 2;
    for (int64_t i = 0; c.masked && i < v.size(); ++i)
      if (!keys[size_t(i / c.dim / c.seq_k / c.heads * c.seq_k + i / c.dim % c.seq_k)]) v.set(i, NAN);
    for (int64_t i = 0; c.masked && i < probs.size(); ++i)
      if (!queries[size_t(i / c.columns / c.seq_q / c.heads * c.seq_q + i / c.columns % c.seq_q)]) probs.set(i, NAN);
    // Nothing of these items may enter a sum.
    for (int64_t i = 0; c.masked && i < dout.size(); ++i)
      if (i / c.dim / c.heads == 1) dout.set(i, NAN);
  }

  ConstTensor key_mask() const { return mask(keys.get(), c.seq_k); }
  ConstTensor query_mask() const { return mask(queries.get(), c.seq_q); }
  ConstTensor mask(const bool* data, int64_t tokens) const {
    return c.masked ? make_tensor(data, {c.batch, tokens}) : ConstTensor();
  }
  bool key_kept(int64_t b, int64_t m) const { return !c.masked || keys[size_t(b * c.seq_k + m)]; }
  bool query_kept(int64_t b, int64_t n) const { return !c.masked || queries[size_t(b * c.seq_q + n)]; }
};

/// The equations in Real, plain sums from left to right.
template <class Real>
struct Reference {
  std::vector<double> out, dv, dprobs;

  explicit Reference(const Inputs& in) {
    const Case& c = in.c;
    for (int64_t head = 0; head < c.batch * c.heads; ++head) {
      const int64_t b = head / c.heads;
      std::vector<int64_t> column(size_t(c.seq_k), -1);
      int64_t visible = 0, rank = 0, kept = 0;
      for (int64_t m = 0; m < c.seq_k; ++m) visible += in.key_kept(b, m);
      for (int64_t m = 0; m < c.seq_k; ++m)
        if (in.key_kept(b, m)) column[size_t(m)] = ((2 * rank++ + 1) * c.columns - 1) / (2 * visible);
      for (int64_t n = 0; n < c.seq_q; ++n) kept += in.query_kept(b, n);
      std::vector<Real> importance(size_t(c.columns), 0), slope(size_t(c.columns), 0);
      for (int64_t n = 0; n < c.seq_q; ++n)
        for (int64_t i = 0; i < c.columns; ++i)
          if (in.query_kept(b, n)) importance[size_t(i)] += Real(in.probs.get((head * c.seq_q + n) * c.columns + i));
      for (Real& x : importance) x = kept ? x / Real(kept) : Real(0);
      add_head(in, head, column, kept, importance, slope);
      for (int64_t n = 0; n < c.seq_q; ++n)
        for (int64_t i = 0; i < c.columns; ++i)
          dprobs.push_back(in.query_kept(b, n) ? double(slope[size_t(i)] / Real(kept)) : 0);
    }
  }

  void add_head(const Inputs& in, int64_t head, const std::vector<int64_t>& column, int64_t kept,
                const std::vector<Real>& importance, std::vector<Real>& slope) {
    const Case& c = in.c;
    std::vector<Real> pooled(size_t(c.dim), 0);
    for (int64_t m = 0; m < c.seq_k; ++m) {
      Real product = 0;
      const bool used = kept > 0 && column[size_t(m)] >= 0;
      for (int64_t e = 0; e < c.dim; ++e) {
        const int64_t i = (head * c.seq_k + m) * c.dim + e;
        Real gradient = 0;
        if (used) {
          const Real weight = importance[size_t(column[size_t(m)])], dout = Real(in.dout.get(head * c.dim + e));
          pooled[size_t(e)] += weight * Real(in.v.get(i));
          product += dout * Real(in.v.get(i));
          gradient = weight * dout;
        }
        dv.push_back(double(gradient + (c.masked ? Real(in.base.get(i)) : Real(0))));
      }
      if (used) slope[size_t(column[size_t(m)])] += product;
    }
    for (const Real x : pooled) out.push_back(double(x));
  }
};

Array forward(const Inputs& in, int threads, DType dtype) {
  const Case& c = in.c;
  Array out({c.batch, c.heads, 1, c.dim}, dtype, c.layout);
  const Queue queue = Queue::cpu(threads);
  std::vector<char> memory(
      size_t(block_pool_workspace_bytes(queue, in.v.view, in.probs.view, in.key_mask(), in.query_mask(), out.view)));
  block_pool(queue, in.v.view, in.probs.view, in.key_mask(), in.query_mask(), out.view,
             {memory.data(), int64_t(memory.size())});
  return out;
}

struct Gradients {
  Array dv, dprobs;
};

Gradients backward(const Inputs& in, int threads, DType dtype) {
  const Case& c = in.c;
  Gradients g = {Array({c.batch, c.heads, c.seq_k, c.dim}, dtype, c.layout),
                 Array({c.batch, c.heads, c.seq_q, c.columns}, DType::f32, c.layout)};
  const ConstTensor base = c.masked ? ConstTensor(in.base.view) : ConstTensor();
  const Queue queue = Queue::cpu(threads);
  std::vector<char> memory(size_t(block_pool_bwd_workspace_bytes(
      queue, in.dout.view, base, in.v.view, in.probs.view, in.key_mask(), in.query_mask(), g.dv.view, g.dprobs.view)));
  block_pool_bwd(queue, in.dout.view, base, in.v.view, in.probs.view, in.key_mask(), in.query_mask(), g.dv.view,
                 g.dprobs.view, {memory.data(), int64_t(memory.size())});
  return g;
}

void check_case(const Case& c, DType dtype) {
  const Inputs in(c);
  const std::string what = "K " + std::to_string(c.columns) + " M " + std::to_string(c.seq_k);
  const Reference<double> exact(in);
  const Reference<float> plain(in);
  std::vector<float> first[3];
  for (const int threads : {1, 2, 3, 16}) {
    const Array out = forward(in, threads, dtype);
    const Gradients g = backward(in, threads, dtype);
    if (threads == 1) {
      CHECK_BUDGET(what + ", out", out, exact.out, plain.out);
      CHECK_BUDGET(what + ", dv", g.dv, exact.dv, plain.dv);
      CHECK_BUDGET(what + ", dprobs", g.dprobs, exact.dprobs, plain.dprobs);
      first[0] = out.floats(), first[1] = g.dv.floats(), first[2] = g.dprobs.floats();
    }
    CHECK(check::same_bits(first[0], out.floats()) && check::same_bits(first[1], g.dv.floats()));
    CHECK(check::same_bits(first[2], g.dprobs.floats()));
  }
}

}  // namespace

// Many heads, so that the largest error of the plain formula is not one of a few lucky ones.
TEST(pools_and_gradients) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t dim : {1, 7, 16, 17, 64})
      for (const int64_t columns : {1, 5, 16, 40})
        for (const bool masked : {false, true}) {
          check_case({3, 20, 13, 21, dim, columns, masked, DType::f32, masked ? Layout::loose : Layout::dense},
                     DType::f32);
        }
    check_case({1, 8, 4, 6, 512, 9, false}, DType::f32);
  });
}

TEST(half_precision) {
  check::for_each_isa([](const std::string&) {
    for (const DType dtype : {DType::f16, DType::bf16})
      for (const DType out : {DType::f32, DType::f16, DType::bf16})
        check_case({3, 8, 30, 25, 19, 8, true, dtype, Layout::loose}, out);
  });
}

TEST(long_sums_in_pieces) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t tokens : {511, 512, 513, 2000})
      for (const bool masked : {false, true}) check_case({3, 4, tokens, tokens + 3, 6, 48, masked}, DType::f32);
    check_case({1, 8, 5, 5000, 4, 3, false}, DType::f32);
    check_case({1, 8, 5000, 5, 4, 3, false}, DType::f32);
  });
}

// The result is linear in v and in probs, so that a difference quotient has no error but rounding.
TEST(gradients_match_differences) {
  check::for_each_isa([](const std::string&) {
    Inputs in({4, 2, 5, 9, 3, 4, true});
    for (int64_t i = 0; i < in.base.size(); ++i) in.base.set(i, 0);
    for (int64_t i = 0; i < in.dout.size(); ++i) in.dout.set(i, std::isnan(in.dout.get(i)) ? 1 : in.dout.get(i));
    const Gradients g = backward(in, 1, DType::f32);
    const auto check_array = [&](Array& x, const Array& gradient) {
      for (int64_t i = 0; i < x.size(); i += 3) {
        const double old = x.get(i);
        const auto loss = [&](double value) {
          x.set(i, value);
          const Array out = forward(in, 1, DType::f32);
          double sum = 0;
          for (int64_t j = 0; j < out.size(); ++j) sum += double(in.dout.get(j)) * out.get(j);
          return sum;
        };
        CHECK_NEAR(gradient.get(i), (loss(1) - loss(-1)) / 2, 1e-5);
        x.set(i, old);
      }
    };
    check_array(in.v, g.dv);
    check_array(in.probs, g.dprobs);
  });
}

TEST(empty_arrays) {
  check::for_each_isa([](const std::string&) {
    for (const Case& c : {Case{0, 2, 3, 4, 5, 6, true}, Case{2, 0, 3, 4, 5, 6, true}, Case{2, 2, 0, 4, 5, 6, true},
                          Case{2, 2, 3, 0, 5, 6, true}, Case{2, 2, 0, 0, 5, 6, false}, Case{2, 2, 0, 4, 5, 6, false}})
      check_case(c, DType::f32);
  });
}

TEST(errors_name_what_is_wrong) {
  std::vector<float> a(300), b(300), c(300), d(300), e(300);
  const bool keep[10] = {};
  const Queue queue = Queue::cpu(1);
  const Tensor v = make_tensor(a.data(), {2, 1, 3, 4}), probs = make_tensor(b.data(), {2, 1, 5, 6});
  const Tensor out = make_tensor(c.data(), {2, 1, 1, 4}), dv = make_tensor(d.data(), {2, 1, 3, 4});
  const Tensor dprobs = make_tensor(e.data(), {2, 1, 5, 6});
  CHECK_THROWS(block_pool(queue, v, probs, {}, {}, out, {}), "[block_pool] workspace: expected at least");
  CHECK_THROWS(block_pool(queue, v, make_tensor(b.data(), {2, 2, 5, 6}), {}, {}, out, {}), "[block_pool] probs:");
  CHECK_THROWS(block_pool(queue, v, make_tensor(b.data(), {2, 1, 5, 0}), {}, {}, out, {}),
               "[block_pool] probs: expected K of at least 1, got 0");
  CHECK_THROWS(block_pool(queue, v, probs, make_tensor(keep, {2, 5}), {}, out, {}),
               "[block_pool] key_mask: expected shape [B, M] = [2, 3], got [2, 5]");
  CHECK_THROWS(block_pool(queue, v, probs, {}, make_tensor(keep, {2, 3}), out, {}),
               "[block_pool] query_mask: expected shape [B, N] = [2, 5], got [2, 3]");
  CHECK_THROWS(block_pool(queue, v, probs, {}, {}, make_tensor(c.data(), {2, 1, 3, 4}), {}),
               "[block_pool] out: expected shape [B, H, 1, E] = [2, 1, 1, 4], got [2, 1, 3, 4]");
  CHECK_THROWS(block_pool(queue, v, probs, {}, {}, make_tensor(a.data(), {2, 1, 1, 4}), {}),
               "[block_pool] out: expected an output that shares no memory with another argument");
  CHECK_THROWS_AS(TypeMismatch, block_pool(queue, {}, probs, {}, {}, out, {}),
                  "[block_pool] v: expected an array, got none");
  CHECK_THROWS_AS(Unsupported,
                  block_pool(queue, make_tensor(a.data(), {1, 1, 0, 513}), make_tensor(b.data(), {1, 1, 5, 6}), {}, {},
                             make_tensor(std::vector<float>(513).data(), {1, 1, 1, 513}), {}),
                  "for a head dimension above 512");
  CHECK_THROWS(block_pool_bwd(queue, out, probs, v, probs, {}, {}, dv, dprobs, {}), "[block_pool_bwd] base:");
  CHECK_THROWS(block_pool_bwd(queue, out, {}, v, probs, {}, {}, dv, probs, {}),
               "[block_pool_bwd] dprobs: expected an output that shares no memory with another argument");
  CHECK_THROWS(block_pool_bwd(queue, out, {}, v, probs, {}, {}, v, dprobs, {}),
               "[block_pool_bwd] dv: expected an output that shares no memory with another argument");
}
