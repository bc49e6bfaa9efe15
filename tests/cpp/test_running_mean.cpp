#include <memory>
#include <random>

#include "arrays.h"
#include "check.h"
#include "subquad/error.h"
#include "subquad/running_mean.h"

using namespace subquad;
using check::Array;
using check::Layout;

namespace {

struct Case {
  int64_t batch, heads, seq_q, seq_k, dim;
  bool masked, with_state;
  DType dtype = DType::f32;
  Layout layout = Layout::dense;
};

/// The arrays of a case. Masked values are NaN.
struct Inputs {
  Case c;
  Array v, sum, dout, base;
  std::unique_ptr<bool[]> keep;
  std::vector<int32_t> count;

  explicit Inputs(const Case& c_, unsigned seed = 7)
      : c(c_),
        v({c.batch, c.heads, c.seq_k, c.dim}, c.dtype, c.layout),
        sum({c.batch, c.heads, c.dim}, DType::f32, c.layout),
        dout({c.batch, c.heads, c.seq_q, c.dim}, c.dtype, c.layout),
        base({c.batch, c.heads, c.seq_k, c.dim}, DType::f32, c.layout),
        keep(new bool[size_t(c.batch * c.seq_k) + 1]) {
    std::mt19937 random(seed);
    v.fill_normal(random), sum.fill_normal(random, 3), dout.fill_normal(random), base.fill_normal(random);
    for (int64_t i = 0; i < c.batch * c.seq_k; ++i) keep[size_t(i)] = random() % 3 != 0;
    // The second item begins with padding, the last one is nothing else.
    for (int64_t m = 0; m < c.seq_k; ++m) {
      if (c.batch > 1 && m < c.seq_k / 3) keep[size_t(c.seq_k + m)] = false;
      if (c.batch > 2) keep[size_t((c.batch - 1) * c.seq_k + m)] = false;
    }
    for (int64_t i = 0; c.masked && i < v.size(); ++i)
      if (!kept(i / c.dim / c.seq_k / c.heads, i / c.dim % c.seq_k)) v.set(i, NAN);
    for (int64_t b = 0; b < c.batch; ++b) count.push_back(b == 1 ? 0 : int32_t(5 + b));
    for (int64_t i = 0; i < sum.size(); ++i)
      if (i / c.dim / c.heads == 1) sum.set(i, 0);
  }

  bool kept(int64_t b, int64_t m) const { return !c.masked || keep[size_t(b * c.seq_k + m)]; }
  ConstTensor mask() const {
    return c.masked ? make_tensor(static_cast<const bool*>(keep.get()), {c.batch, c.seq_k}) : ConstTensor();
  }
  RunningMeanState state() {
    return c.with_state ? RunningMeanState{sum.view, make_tensor(count.data(), {c.batch})} : RunningMeanState();
  }
  int64_t start(int64_t b) const { return c.with_state ? count[size_t(b)] : 0; }
};

/// The equation in Real, from left to right.
template <class Real>
std::vector<double> means(const Inputs& in, std::vector<double>* sums = nullptr) {
  const Case& c = in.c;
  std::vector<double> out(size_t(c.batch * c.heads * c.seq_q * c.dim));
  for (int64_t head = 0; head < c.batch * c.heads; ++head)
    for (int64_t e = 0; e < c.dim; ++e) {
      const int64_t b = head / c.heads;
      Real sum = c.with_state ? Real(in.sum.get(head * c.dim + e)) : Real(0);
      int64_t count = in.start(b), m = 0;
      const auto add_until = [&](int64_t end) {
        for (; m < std::min(end, c.seq_k); ++m)
          if (in.kept(b, m)) sum += Real(in.v.get((head * c.seq_k + m) * c.dim + e)), ++count;
      };
      for (int64_t n = 0; n < c.seq_q; ++n) {
        add_until(n + c.seq_k - c.seq_q + 1);
        out[size_t((head * c.seq_q + n) * c.dim + e)] = count > 0 ? double(sum / Real(count)) : 0;
      }
      add_until(c.seq_k);
      if (sums) sums->push_back(double(sum));
    }
  return out;
}

template <class Real>
std::vector<double> gradients(const Inputs& in, bool with_base) {
  const Case& c = in.c;
  std::vector<double> dv(size_t(c.batch * c.heads * c.seq_k * c.dim));
  for (int64_t head = 0; head < c.batch * c.heads; ++head)
    for (int64_t e = 0; e < c.dim; ++e) {
      const int64_t b = head / c.heads, offset = c.seq_k - c.seq_q;
      int64_t count = in.start(b);
      for (int64_t m = 0; m < c.seq_k; ++m) count += in.kept(b, m);
      Real sum = 0;
      for (int64_t m = c.seq_k - 1; m >= 0; --m) {
        if (m >= offset && count > 0) sum += Real(in.dout.get((head * c.seq_q + m - offset) * c.dim + e)) / Real(count);
        const size_t i = size_t((head * c.seq_k + m) * c.dim + e);
        dv[i] = double((in.kept(b, m) ? sum : Real(0)) + (with_base ? Real(in.base.get(int64_t(i))) : Real(0)));
        count -= in.kept(b, m);
      }
    }
  return dv;
}

struct Result {
  Array out, sum;
  std::vector<int32_t> count;
};

Result forward(Inputs& in, int threads, DType dtype = DType::f32) {
  const Case& c = in.c;
  Result r = {Array({c.batch, c.heads, c.seq_q, c.dim}, dtype, c.layout),
              Array({c.batch, c.heads, c.dim}, DType::f32, c.layout), std::vector<int32_t>(size_t(c.batch), -1)};
  const RunningMeanState state = in.state(), left = {r.sum.view, make_tensor(r.count.data(), {c.batch})};
  const Queue queue = Queue::cpu(threads);
  std::vector<char> memory(size_t(running_mean_workspace_bytes(queue, in.v.view, in.mask(), state, r.out.view, left)));
  running_mean(queue, in.v.view, in.mask(), state, r.out.view, left, {memory.data(), int64_t(memory.size())});
  return r;
}

Array backward(Inputs& in, bool with_base, int threads, DType dtype = DType::f32) {
  const Case& c = in.c;
  Array dv({c.batch, c.heads, c.seq_k, c.dim}, dtype, c.layout);
  const ConstTensor base = with_base ? ConstTensor(in.base.view) : ConstTensor();
  const RunningMeanState state = {{}, in.state().count};
  const Queue queue = Queue::cpu(threads);
  std::vector<char> memory(
      size_t(running_mean_bwd_workspace_bytes(queue, in.dout.view, base, in.mask(), state, dv.view)));
  running_mean_bwd(queue, in.dout.view, base, in.mask(), state, dv.view, {memory.data(), int64_t(memory.size())});
  return dv;
}

void check_case(const Case& c, DType out_dtype) {
  Inputs in(c);
  const std::string what = "N " + std::to_string(c.seq_q) + " M " + std::to_string(c.seq_k);
  std::vector<double> exact_sums, plain_sums;
  const std::vector<double> exact = means<double>(in, &exact_sums), plain = means<float>(in, &plain_sums);
  const std::vector<double> exact_dv = gradients<double>(in, c.masked), plain_dv = gradients<float>(in, c.masked);
  std::vector<float> first, first_sum, first_dv;
  for (const int threads : {1, 2, 3, 16}) {
    const Result r = forward(in, threads, out_dtype);
    const Array dv = backward(in, c.masked, threads, out_dtype);
    if (threads == 1) {
      CHECK_BUDGET(what + ", out", r.out, exact, plain);
      CHECK_BUDGET(what + ", sum", r.sum, exact_sums, plain_sums);
      CHECK_BUDGET(what + ", dv", dv, exact_dv, plain_dv);
      first = r.out.floats(), first_sum = r.sum.floats(), first_dv = dv.floats();
    }
    CHECK(check::same_bits(first, r.out.floats()) && check::same_bits(first_sum, r.sum.floats()));
    CHECK(check::same_bits(first_dv, dv.floats()));
    for (int64_t b = 0; b < c.batch; ++b) {
      int64_t count = in.start(b);
      for (int64_t m = 0; m < c.seq_k; ++m) count += in.kept(b, m);
      CHECK(r.count[size_t(b)] == count);
    }
  }
}

}  // namespace

TEST(means_and_gradients) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t dim : {1, 3, 8, 15, 16, 17, 33, 64})
      for (int bits = 0; bits < 4; ++bits)
        for (const int64_t seq_q : {1, 9, 20}) {
          Case c = {3, 2, seq_q, 14, dim, (bits & 1) != 0, (bits & 2) != 0};
          if (bits & 1) c.layout = Layout::loose;
          check_case(c, DType::f32);
        }
    check_case({1, 1, 5, 7, 512, true, true}, DType::f32);
  });
}

TEST(half_precision) {
  check::for_each_isa([](const std::string&) {
    for (const DType dtype : {DType::f16, DType::bf16})
      for (const DType out : {DType::f32, DType::f16, DType::bf16})
        check_case({3, 2, 30, 25, 19, true, true, dtype, Layout::loose}, out);
  });
}

TEST(long_sums_in_segments) {
  check::for_each_isa([](const std::string&) {
    for (const int64_t seq_k : {1023, 1024, 1025, 3000})
      for (const int64_t seq_q : {seq_k - 700, seq_k, seq_k + 1100})
        check_case({2, 1, seq_q, seq_k, 5, seq_k == 3000, seq_q == seq_k}, DType::f32);
    check_case({1, 1, 65536, 65536, 2, false, false}, DType::f32);
  });
}

TEST(rows_do_not_see_what_comes_later) {
  check::for_each_isa([](const std::string&) {
    for (const int threads : {1, 16}) {
      Inputs in({1, 1, 2500, 2500, 7, false, false}), changed({1, 1, 2500, 2500, 7, false, false});
      for (const int64_t last : {10, 1023, 1024, 2100}) {
        for (int64_t i = 0; i < in.v.size(); ++i) changed.v.set(i, i / 7 > last ? NAN : in.v.get(i));
        const std::vector<float> a = forward(in, threads).out.floats(), b = forward(changed, threads).out.floats();
        CHECK(!std::memcmp(a.data(), b.data(), size_t(last + 1) * 7 * sizeof(float)));
        CHECK(std::isnan(b[size_t(last + 1) * 7]));
      }
    }
  });
}

// In chunks, each from the state that the one before left, written over its own input.
TEST(state_continues_a_sequence) {
  check::for_each_isa([](const std::string&) {
    Inputs in({3, 2, 40, 40, 6, true, true});
    const std::vector<double> exact = means<double>(in), plain = means<float>(in);
    const Result whole = forward(in, 1);
    Array out({3, 2, 40, 6}, DType::f32);
    const RunningMeanState state = in.state();
    const int64_t ends[] = {1, 2, 17, 17, 40};
    int64_t first = 0;
    for (const int64_t end : ends) {
      Tensor v = in.v.view, part = out.view;
      ConstTensor mask = in.mask();
      v.data = static_cast<const float*>(v.data) + first * v.stride[2], v.shape[2] = end - first;
      part.data = static_cast<const float*>(part.data) + first * part.stride[2], part.shape[2] = end - first;
      mask.data = static_cast<const bool*>(mask.data) + first, mask.shape[1] = end - first;
      std::vector<char> memory(size_t(running_mean_workspace_bytes(Queue::cpu(2), v, mask, state, part, state)));
      running_mean(Queue::cpu(2), v, mask, state, part, state, {memory.data(), int64_t(memory.size())});
      first = end;
    }
    CHECK_BUDGET("chunks", out, exact, plain);
    CHECK(in.count == whole.count);
  });
}

// The mean is linear, so that a difference quotient has no error but rounding.
TEST(gradients_match_differences) {
  check::for_each_isa([](const std::string&) {
    Inputs in({2, 2, 12, 9, 3, true, true});
    const Array dv = backward(in, false, 1);
    for (int64_t i = 0; i < in.v.size(); i += 5) {
      const double old = in.v.get(i);
      const auto loss = [&](double x) {
        in.v.set(i, x);
        const Result r = forward(in, 1);
        double sum = 0;
        for (int64_t j = 0; j < r.out.size(); ++j) sum += double(in.dout.get(j)) * r.out.get(j);
        return sum;
      };
      CHECK_NEAR(dv.get(i), (loss(1) - loss(-1)) / 2, 2e-6);
      in.v.set(i, old);
    }
  });
}

TEST(gradients_of_rows_without_keys_have_no_effect) {
  check::for_each_isa([](const std::string&) {
    Inputs in({2, 1, 30, 20, 4, true, false});
    const std::vector<double> exact = gradients<double>(in, false), plain = gradients<float>(in, false);
    for (int64_t n = 0; n < 10; ++n)
      for (int64_t e = 0; e < 4; ++e) in.dout.set(n * 4 + e, NAN);
    // The second item begins with padding: its rows 10 to 15 have a mean of nothing.
    for (int64_t n = 0; n < 16; ++n)
      for (int64_t e = 0; e < 4; ++e) in.dout.set((30 + n) * 4 + e, NAN);
    CHECK_BUDGET("dv", backward(in, false, 1), exact, plain);
  });
}

TEST(empty_arrays) {
  check::for_each_isa([](const std::string&) {
    for (const Case& c :
         {Case{0, 2, 3, 3, 4, true, true}, Case{2, 0, 3, 3, 4, true, true}, Case{2, 2, 0, 3, 4, true, true},
          Case{3, 2, 5, 0, 4, true, true}, Case{2, 2, 0, 0, 4, false, false}})
      check_case(c, DType::f32);
  });
}

TEST(errors_name_what_is_wrong) {
  std::vector<float> a(200), b(200), c(200);
  std::vector<int32_t> count = {1, -2}, other(2);
  const bool keep[10] = {};
  const Queue queue = Queue::cpu(1);
  const Tensor v = make_tensor(a.data(), {2, 1, 3, 4}), out = make_tensor(b.data(), {2, 1, 5, 4});
  const Tensor sum = make_tensor(c.data(), {2, 1, 4}), counts = make_tensor(count.data(), {2});
  CHECK_THROWS(running_mean(queue, v, {}, {sum, counts}, out, {}, {}),
               "[running_mean] state.count: expected values of at least 0, got -2 at [1]");
  count[1] = INT32_MAX - 2;
  CHECK_THROWS(running_mean(queue, v, {}, {sum, counts}, out, {}, {}),
               "[running_mean] state.count: expected at most 2147483647 values in all, got 2147483648 at [1]");
  count[1] = INT32_MAX - 3;
  CHECK_THROWS(running_mean(queue, v, {}, {sum, counts}, out, {}, {}), "[running_mean] workspace: expected at least");
  CHECK_THROWS_AS(TypeMismatch, running_mean(queue, v, {}, {sum, {}}, out, {}, {}),
                  "[running_mean] state.count: expected an array together with state.sum, got none");
  CHECK_THROWS_AS(TypeMismatch, running_mean(queue, v, {}, {{}, counts}, out, {}, {}),
                  "[running_mean] state.sum: expected an array together with state.count, got none");
  CHECK_THROWS_AS(TypeMismatch, running_mean(queue, v, {}, {}, out, {sum, {}}, {}),
                  "[running_mean] new_state.count: expected an array together with new_state.sum, got none");
  CHECK_THROWS(running_mean(queue, v, make_tensor(keep, {2, 5}), {}, out, {}, {}),
               "[running_mean] key_mask: expected shape [B, M] = [2, 3], got [2, 5]");
  CHECK_THROWS(running_mean(queue, v, {}, {}, make_tensor(b.data(), {2, 1, 5, 3}), {}, {}), "[running_mean] out:");
  CHECK_THROWS(running_mean(queue, v, {}, {}, v, {}, {}),
               "[running_mean] out: expected an output that shares no memory with another argument");
  CHECK_THROWS(running_mean(queue, v, {}, {sum, counts}, out,
                            {make_tensor(c.data() + 4, {2, 1, 4}), make_tensor(other.data(), {2})}, {}),
               "[running_mean] new_state.sum: expected an output that shares no memory with another argument");
  CHECK_THROWS_AS(
      Unsupported,
      running_mean(queue, make_tensor(a.data(), {1, 1, 0, 513}), {}, {}, make_tensor(b.data(), {1, 1, 0, 513}), {}, {}),
      "for a head dimension above 512");
  CHECK_THROWS(running_mean_bwd(queue, out, out, {}, {}, v, {}),
               "[running_mean_bwd] base: expected shape [B, H, M, E] = [2, 1, 3, 4], got [2, 1, 5, 4]");
  CHECK_THROWS(running_mean_bwd(queue, out, {}, {}, {}, make_tensor(b.data(), {2, 1, 3, 4}), {}),
               "[running_mean_bwd] dv: expected an output that shares no memory with another argument");
}
