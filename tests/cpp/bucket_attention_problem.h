/// Problems of bucket_attention with random codes, and what both passes must give for them.
///
/// Values are small multiples of 1/8 and the scale is 1/4, so that every f32 sum is exact and results compare exactly
/// with a brute-force sum in double.
#pragma once
#include <limits>
#include <memory>
#include <random>

#include "check.h"
#include "subquad/bucket_attention.h"

namespace check {

using namespace subquad;

static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Sizes {
  int64_t batch = 2, heads_q = 2, heads_kv = 2, num_hashes = 5, seq_q = 19, seq_k = 23, dim_v = 16;
  int64_t num_buckets = 8;
  bool causal = false, masked = false;
};

template <class Code, class T>
struct Problem {
  Sizes s;
  std::vector<Code> codes_q, codes_k;
  std::vector<T> v, dout, out, dv;
  std::vector<uint8_t> key_mask, query_mask;

  BucketAttentionOptions options() const {
    BucketAttentionOptions o;
    o.num_buckets = s.num_buckets, o.scale = 0.25, o.is_causal = s.causal;
    if (s.masked) {
      o.key_mask = make_tensor(reinterpret_cast<const bool*>(key_mask.data()), {s.batch, s.seq_k});
      o.query_mask = make_tensor(reinterpret_cast<const bool*>(query_mask.data()), {s.batch, s.seq_q});
    }
    return o;
  }
  ConstTensor q() const { return make_tensor(codes_q.data(), {s.batch, s.heads_q, s.num_hashes, s.seq_q}); }
  ConstTensor k() const { return make_tensor(codes_k.data(), {s.batch, s.heads_kv, s.num_hashes, s.seq_k}); }

  Tensor of_queries(T* data) const { return make_tensor(data, {s.batch, s.heads_q, s.seq_q, s.dim_v}); }
  Tensor of_keys(T* data) const { return make_tensor(data, {s.batch, s.heads_kv, s.seq_k, s.dim_v}); }
  bool sees(int64_t b, int64_t n, int64_t m) const {
    if (s.causal && m > n + s.seq_k - s.seq_q) return false;
    return !s.masked || (key_mask[b * s.seq_k + m] && query_mask[b * s.seq_q + n]);
  }
};

template <class T>
static T rounded(double x) {
  T y;
  from_float(float(x), &y);
  return y;
}

template <class Code, class T>
static Problem<Code, T> make_problem(const Sizes& s) {
  Problem<Code, T> p = {s, {}, {}, {}, {}, {}, {}, {}, {}};
  std::mt19937 random(1);
  // Half of the codes come from four values, so that tokens meet however many buckets there are.
  const auto code = [&] {
    const int64_t any = random() % s.num_buckets;
    return Code(random() % 2 ? any : any % 4 * (s.num_buckets - 1) / 3);
  };
  const auto fill = [&](std::vector<T>& x, int64_t heads, int64_t seq, const std::vector<uint8_t>& mask) {
    for (int64_t i = 0; i < s.batch * heads * seq * s.dim_v; ++i) {
      const int64_t token = i / s.dim_v % seq, b = i / (heads * seq * s.dim_v);
      const bool hidden = s.masked && !mask[b * seq + token];
      x.push_back(rounded<T>(hidden ? kNan : (int(random() % 33) - 16) / 8.0));
    }
  };
  for (int64_t i = 0; i < s.batch * s.heads_q * s.num_hashes * s.seq_q; ++i) p.codes_q.push_back(code());
  for (int64_t i = 0; i < s.batch * s.heads_kv * s.num_hashes * s.seq_k; ++i) p.codes_k.push_back(code());
  for (int64_t i = 0; i < s.batch * s.seq_k; ++i) p.key_mask.push_back(random() % 3 != 0);
  for (int64_t i = 0; i < s.batch * s.seq_q; ++i) p.query_mask.push_back(random() % 3 != 0);
  fill(p.v, s.heads_kv, s.seq_k, p.key_mask);
  fill(p.dout, s.heads_q, s.seq_q, p.query_mask);
  p.out.assign(p.dout.size(), rounded<T>(kNan));
  p.dv.assign(p.v.size(), rounded<T>(kNan));
  return p;
}

/// Scratch memory of exactly `bytes`, at an odd address, so that sanitizers see what goes past it.
struct Memory {
  explicit Memory(int64_t bytes) : block(new char[size_t(bytes) + 1]), view{block.get() + 1, bytes} {}
  std::unique_ptr<char[]> block;
  Workspace view;
};

template <class Code, class T>
static void run(Problem<Code, T>& p, int threads = 1) {
  const Queue queue = Queue::cpu(threads);
  const Tensor v = p.of_keys(p.v.data()), dv = p.of_keys(p.dv.data());
  const Tensor dout = p.of_queries(p.dout.data()), out = p.of_queries(p.out.data());
  const Memory forward(bucket_attention_workspace_bytes(queue, p.q(), p.k(), v, p.options(), out));
  bucket_attention(queue, p.q(), p.k(), v, p.options(), out, forward.view);
  const Memory backward(bucket_attention_bwd_workspace_bytes(queue, dout, p.q(), p.k(), p.options(), dv));
  bucket_attention_bwd(queue, dout, p.q(), p.k(), p.options(), dv, backward.view);
}

/// Elements of `out` and `dv` that differ from the definition.
template <class Code, class T>
static int64_t wrong(const Problem<Code, T>& p) {
  const Sizes& s = p.s;
  std::vector<double> out(p.out.size()), dv(p.dv.size());
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads_q; ++h) {
      const int64_t g = h / (s.heads_q / s.heads_kv), row_q = b * s.heads_q + h, row_k = b * s.heads_kv + g;
      for (int64_t n = 0; n < s.seq_q; ++n)
        for (int64_t m = 0; m < s.seq_k; ++m) {
          int equal = 0;
          for (int64_t r = 0; p.sees(b, n, m) && r < s.num_hashes; ++r)
            equal += p.codes_q[(row_q * s.num_hashes + r) * s.seq_q + n] ==
                     p.codes_k[(row_k * s.num_hashes + r) * s.seq_k + m];
          for (int64_t e = 0; equal && e < s.dim_v; ++e) {
            const int64_t at_q = (row_q * s.seq_q + n) * s.dim_v + e, at_k = (row_k * s.seq_k + m) * s.dim_v + e;
            out[at_q] += 0.25 * equal * to_float(p.v[at_k]);
            dv[at_k] += 0.25 * equal * to_float(p.dout[at_q]);
          }
        }
    }
  int64_t count = 0;
  for (size_t i = 0; i < out.size(); ++i) count += !(to_float(p.out[i]) == to_float(rounded<T>(out[i])));
  for (size_t i = 0; i < dv.size(); ++i) count += !(to_float(p.dv[i]) == to_float(rounded<T>(dv[i])));
  return count;
}

template <class Code, class T>
static void check_problem(const Sizes& s) {
  Problem<Code, T> p = make_problem<Code, T>(s);
  run(p);
  const int64_t sizes[] = {wrong(p), s.heads_q, s.heads_kv,    s.num_hashes, s.seq_q,
                           s.seq_k,  s.dim_v,   s.num_buckets, s.causal,     s.masked};
  std::string text = "wrong elements, H, Hkv, R, N, M, E, buckets, causal, masked:";
  for (int64_t size : sizes) text += " " + std::to_string(size);
  if (sizes[0] > 0) check::fail(__FILE__, __LINE__, text);
}

template <class T>
static bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Values whose sums depend on the order.
template <class Code>
static Problem<Code, float> rounding_problem(const Sizes& s) {
  Problem<Code, float> p = make_problem<Code, float>(s);
  std::mt19937 random(7);
  for (std::vector<float>* x : {&p.v, &p.dout})
    for (float& value : *x) value = float(random()) * 1e-9f - 2;
  return p;
}

}  // namespace check
