/// Problems for bucket_gradient, calls of it, and the answers: the equations of its header in double, one pair after
/// the other.
#pragma once
#include <algorithm>
#include <memory>
#include <random>

#include "check.h"
#include "core/philox.h"
#include "subquad/bucket_gradient.h"

namespace sampled {

using namespace subquad;

struct Sizes {
  int64_t batch = 1, heads_q = 2, heads_kv = 1, num_hashes = 3, seq_q = 21, seq_k = 17, dim_qk = 8, dim_v = 5;
  int64_t hash_bits = 3, num_samples = 4, used_codes = 0;  // used_codes: codes that occur; 0 = all
  GradientRule rule = GradientRule::lower_bound;
  bool causal = false, masked = false;
  double likeness = 0;  // how near keys come to queries (1), or to their opposites (-1)
};

/// The gradient of one row, and a bound of what f32 sums may lose in it.
struct Row {
  std::vector<double> value;
  double magnitude;
};

/// G is the type of dout.
template <class Code, class T, class G = T>
struct Problem {
  using Value = T;

  Sizes s;
  uint64_t seed;
  std::vector<T> q, k, v;
  std::vector<G> dout;
  std::vector<Code> codes_q, codes_k;
  std::vector<uint8_t> key_mask, query_mask;

  Problem(const Sizes& sizes, unsigned draw) : s(sizes), seed(0x123456789abcdefull * draw) {
    std::mt19937 random(draw);
    std::normal_distribution<double> normal;
    const auto fill = [&](auto& x, int64_t count) {
      x.resize(size_t(count));
      for (auto& value : x) from_float(float(normal(random)), &value);
    };
    fill(q, s.batch * s.heads_q * s.seq_q * s.dim_qk), fill(k, s.batch * s.heads_kv * s.seq_k * s.dim_qk);
    fill(v, s.batch * s.heads_kv * s.seq_k * s.dim_v), fill(dout, s.batch * s.heads_q * s.seq_q * s.dim_v);
    for (size_t i = 0; s.likeness != 0 && i < std::min(k.size(), q.size()); ++i)
      from_float(float(s.likeness * to_float(q[i]) + (1 - std::fabs(s.likeness)) * to_float(k[i])), &k[i]);
    const int64_t codes = s.used_codes ? s.used_codes : int64_t(1) << s.hash_bits;
    const int64_t step = (int64_t(1) << s.hash_bits) / codes;  // spread over the range
    for (int64_t i = 0; i < s.batch * s.heads_q * s.num_hashes * s.seq_q; ++i)
      codes_q.push_back(Code(random() % codes * step));
    for (int64_t i = 0; i < s.batch * s.heads_kv * s.num_hashes * s.seq_k; ++i)
      codes_k.push_back(Code(random() % codes * step));
    for (int64_t i = 0; i < s.batch * s.seq_k; ++i) key_mask.push_back(!s.masked || random() % 4 != 0);
    for (int64_t i = 0; i < s.batch * s.seq_q; ++i) query_mask.push_back(!s.masked || random() % 4 != 0);
    hide(k, key_mask, s.heads_kv, s.seq_k, s.dim_qk), hide(v, key_mask, s.heads_kv, s.seq_k, s.dim_v);
    hide(q, query_mask, s.heads_q, s.seq_q, s.dim_qk), hide(dout, query_mask, s.heads_q, s.seq_q, s.dim_v);
  }

  template <class U>
  void hide(std::vector<U>& x, const std::vector<uint8_t>& mask, int64_t heads, int64_t seq, int64_t dim) const {
    for (int64_t i = 0; i < int64_t(x.size()); ++i)
      if (!mask[size_t(i / (heads * seq * dim) * seq + i / dim % seq)]) from_float(NAN, &x[size_t(i)]);
  }

  int64_t group() const { return s.heads_q / s.heads_kv; }
  bool sees(int64_t b, int64_t n, int64_t m) const {
    return query_mask[size_t(b * s.seq_q + n)] && key_mask[size_t(b * s.seq_k + m)] &&
           (!s.causal || m <= n + s.seq_k - s.seq_q);
  }
  int64_t code_q(int64_t b, int64_t h, int64_t r, int64_t n) const {
    return codes_q[size_t(((b * s.heads_q + h) * s.num_hashes + r) * s.seq_q + n)];
  }
  int64_t code_k(int64_t b, int64_t h, int64_t r, int64_t m) const {
    return codes_k[size_t(((b * s.heads_kv + h / group()) * s.num_hashes + r) * s.seq_k + m)];
  }
  template <class U>
  std::vector<double> row(const std::vector<U>& x, int64_t heads, int64_t seq, int64_t dim, int64_t b, int64_t h,
                          int64_t n) const {
    std::vector<double> values;
    for (int64_t d = 0; d < dim; ++d) values.push_back(to_float(x[size_t(((b * heads + h) * seq + n) * dim + d)]));
    return values;
  }
  std::vector<double> q_row(int64_t b, int64_t h, int64_t n) const {
    return row(q, s.heads_q, s.seq_q, s.dim_qk, b, h, n);
  }
  std::vector<double> k_row(int64_t b, int64_t h, int64_t m) const {
    return row(k, s.heads_kv, s.seq_k, s.dim_qk, b, h / group(), m);
  }
};

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

inline std::vector<double> unit(std::vector<double> x) {
  const double length = std::sqrt(dot(x, x));
  for (double& value : x) value = length > 0 ? value / length : 0;
  return x;
}

/// (candidate, weight) of a list of candidates, by the definition of the header.
inline std::vector<std::pair<int64_t, double>> sample(const std::vector<int64_t>& list, int64_t samples,
                                                      uint32_t word) {
  const int64_t n = int64_t(list.size());
  std::vector<std::pair<int64_t, double>> taken;
  if (n <= samples)
    for (const int64_t candidate : list) taken.push_back({candidate, 1.0});
  else
    for (int64_t t = 0; t < samples; ++t)
      taken.push_back({list[size_t((philox::below(word, n) + t * n / samples) % n)], double(n) / double(samples)});
  return taken;
}

/// The weighted pairs of a target under query head h: the target is query `target`, or key `target`.
template <class P>
std::vector<std::pair<int64_t, double>> pairs_of(const P& p, bool of_query, int64_t b, int64_t h, int64_t target) {
  const Sizes& s = p.s;
  std::vector<std::pair<int64_t, double>> pairs;
  const uint32_t head = uint32_t(h) + (of_query ? 0 : 0x80000000u);
  for (int64_t r = 0; r < s.num_hashes; ++r) {
    std::vector<int64_t> own, flipped;
    const auto collect = [&](int64_t difference, std::vector<int64_t>& list) {
      for (int64_t c = 0; c < (of_query ? s.seq_k : s.seq_q); ++c) {
        const int64_t n = of_query ? target : c, m = of_query ? c : target;
        if (p.sees(b, n, m) && (p.code_q(b, h, r, n) ^ p.code_k(b, h, r, m)) == difference) list.push_back(c);
      }
    };
    const auto draw = [&](const std::vector<int64_t>& list, uint32_t first, double scale) {
      const philox::Words words =
          philox::words(p.seed, uint32_t(target), first + uint32_t(r / 4), head, philox::kPairs);
      for (const auto& pair : sample(list, s.num_samples, words.w[r % 4]))
        pairs.push_back({pair.first, pair.second * scale / double(s.num_hashes)});
    };
    collect(0, own);
    draw(own, 0, 1);
    if (s.rule == GradientRule::lower_bound) continue;
    for (int64_t bit = 0; bit < s.hash_bits; ++bit) collect(int64_t(1) << bit, flipped);
    draw(flipped, 1u << 30, 1.0 / double(s.hash_bits));
  }
  return pairs;
}

/// Adds the pairs of one target to the gradient for its unit row.
template <class P>
void add_pairs(const P& p, bool of_query, int64_t b, int64_t h, int64_t target, Row& sum) {
  const Sizes& s = p.s;
  const std::vector<double> own = unit(of_query ? p.q_row(b, h, target) : p.k_row(b, h, target));
  for (const auto& pair : pairs_of(p, of_query, b, h, target)) {
    const int64_t n = of_query ? target : pair.first, m = of_query ? pair.first : target;
    const std::vector<double> other = unit(of_query ? p.k_row(b, h, m) : p.q_row(b, h, n));
    const std::vector<double> g = p.row(p.dout, s.heads_q, s.seq_q, s.dim_v, b, h, n);
    const std::vector<double> v = p.row(p.v, s.heads_kv, s.seq_k, s.dim_v, b, h / p.group(), m);
    const bool exact = s.rule == GradientRule::exact;
    const double x = dot(own, other), sine = std::sqrt(std::max(0.0, (1 - x) * (1 + x)));
    if (exact && sine < 1e-4) continue;
    const double factor = pair.second * double(s.hash_bits) / (exact ? 3.14159265358979323846 : 2.0);
    for (size_t d = 0; d < own.size(); ++d)
      sum.value[d] += factor * dot(g, v) * (exact ? (other[d] - x * own[d]) / sine : other[d]);
    sum.magnitude += factor * std::sqrt(dot(g, g) * dot(v, v)) * (exact ? 1 + 1 / sine : 1);
  }
}

/// dq of query (b, h, token), or dk of key (b, h, token).
template <class P>
Row gradient(const P& p, bool of_query, int64_t b, int64_t h, int64_t token) {
  const Sizes& s = p.s;
  Row sum = {std::vector<double>(size_t(s.dim_qk)), 0};
  const bool kept = of_query ? p.query_mask[size_t(b * s.seq_q + token)] : p.key_mask[size_t(b * s.seq_k + token)];
  const int64_t first = of_query ? h : h * p.group();
  const std::vector<double> raw = of_query ? p.q_row(b, h, token) : p.k_row(b, first, token);
  const double length = std::sqrt(dot(raw, raw));
  if (!kept || length == 0) return sum;
  for (int64_t member = 0; member < (of_query ? 1 : p.group()); ++member)
    add_pairs(p, of_query, b, first + member, token, sum);
  const std::vector<double> own = unit(raw);
  const double along = dot(own, sum.value);
  for (size_t d = 0; d < own.size(); ++d) sum.value[d] = (sum.value[d] - own[d] * along) / length;
  sum.magnitude /= length;
  return sum;
}

template <class T>
struct Gradients {
  std::vector<T> dq, dk;
};

template <class P>
BucketGradientOptions options(const P& p, const int64_t* seed) {
  const Sizes& s = p.s;
  BucketGradientOptions o;
  o.hash_bits = s.hash_bits, o.num_samples = s.num_samples, o.rule = s.rule, o.is_causal = s.causal;
  o.seed = Seed(p.seed);
  o.seed.pointer = seed;
  if (s.masked) {
    o.key_mask = make_tensor(reinterpret_cast<const bool*>(p.key_mask.data()), {s.batch, s.seq_k});
    o.query_mask = make_tensor(reinterpret_cast<const bool*>(p.query_mask.data()), {s.batch, s.seq_q});
  }
  return o;
}

struct Arrays {
  ConstTensor dout, q, k, v, codes_q, codes_k;
  Tensor dq, dk;
};

template <class P, class T>
Arrays arrays_of(const P& p, Gradients<T>& out) {
  const Sizes& s = p.s;
  return {make_tensor(p.dout.data(), {s.batch, s.heads_q, s.seq_q, s.dim_v}),
          make_tensor(p.q.data(), {s.batch, s.heads_q, s.seq_q, s.dim_qk}),
          make_tensor(p.k.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_qk}),
          make_tensor(p.v.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_v}),
          make_tensor(p.codes_q.data(), {s.batch, s.heads_q, s.num_hashes, s.seq_q}),
          make_tensor(p.codes_k.data(), {s.batch, s.heads_kv, s.num_hashes, s.seq_k}),
          make_tensor(out.dq.data(), {s.batch, s.heads_q, s.seq_q, s.dim_qk}),
          make_tensor(out.dk.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_qk})};
}

inline void call(const Arrays& a, const BucketGradientOptions& o, int threads) {
  const Queue queue = Queue::cpu(threads);
  const int64_t bytes =
      bucket_gradient_workspace_bytes(queue, a.dout, a.q, a.k, a.v, a.codes_q, a.codes_k, o, a.dq, a.dk);
  // Of exactly that size, at an odd address and full of NaN.
  const std::unique_ptr<char[]> memory(new char[size_t(bytes) + 1]);
  std::memset(memory.get(), 0xff, size_t(bytes) + 1);
  bucket_gradient(queue, a.dout, a.q, a.k, a.v, a.codes_q, a.codes_k, o, a.dq, a.dk, {memory.get() + 1, bytes});
}

template <class P, class T = typename P::Value>
Gradients<T> run(const P& p, int threads = 1, const int64_t* seed = nullptr) {
  Gradients<T> out = {p.q, p.k};
  for (T& x : out.dq) from_float(NAN, &x);
  for (T& x : out.dk) from_float(NAN, &x);
  call(arrays_of(p, out), options(p, seed), threads);
  return out;
}

/// The values of a dense view in memory of [B, N, H, D + 3], batches backwards, and the view of them there.
template <class T>
struct Loose {
  std::vector<T> memory;
  Tensor view;

  explicit Loose(const ConstTensor& dense) {
    const int64_t *shape = dense.shape, pitch = shape[3] + 3, batch = shape[1] * shape[2] * pitch;
    memory.resize(size_t(shape[0] * batch));
    static_cast<ConstTensor&>(view) = dense;
    view.data = memory.data() + (shape[0] - 1) * batch;
    view.stride[0] = -batch, view.stride[1] = pitch, view.stride[2] = shape[1] * pitch;
    for (int64_t i = 0; i < dense.numel(); ++i) at(i) = static_cast<const T*>(dense.data)[i];
  }

  T& at(int64_t i) {
    const int64_t n = i / view.shape[3], h = n / view.shape[2];
    return static_cast<T*>(
        view.mutable_data())[h / view.shape[1] * view.stride[0] + h % view.shape[1] * view.stride[1] +
                             n % view.shape[2] * view.stride[2] + i % view.shape[3]];
  }
};

}  // namespace sampled
