/// Keys under masks as ranks, for the tests of the operators that take `visible` and `positions`.
#pragma once
#include "arrays.h"
#include "subquad/error.h"

namespace check {

/// counts [B, N] and positions [B, M], as visible_keys.h defines them; the last axis of counts has a gap behind it.
struct Ranked {
  int64_t batch, seq_q, seq_k;
  bool has_positions;
  std::vector<int32_t> counts, positions;

  /// With masks a third of the keys and some queries are left out, and of the last item all keys.
  Ranked(int64_t b, int64_t n, int64_t m, bool masked, bool causal, std::mt19937& random)
      : batch(b), seq_q(n), seq_k(m), has_positions(masked), counts(size_t(b * (n + 2)), -7) {
    for (int64_t item = 0; item < b; ++item) {
      std::vector<int32_t> keys;
      for (int64_t key = 0; key < m; ++key)
        if (!masked || (random() % 3 != 0 && (item == 0 || item + 1 < b))) keys.push_back(int32_t(key));
      for (int64_t row = 0; row < n; ++row) {
        int32_t count = int32_t(keys.size());
        if (causal)
          count = int32_t(std::count_if(keys.begin(), keys.end(), [&](int32_t k) { return k <= row + m - n; }));
        counts[size_t(item * (n + 2) + row)] = masked && random() % 7 == 0 ? 0 : count;
      }
      keys.resize(size_t(m), -1);
      positions.insert(positions.end(), keys.begin(), keys.end());
    }
  }

  int64_t count(int64_t b, int64_t n) const { return counts[size_t(b * (seq_q + 2) + n)]; }
  int64_t key(int64_t b, int64_t rank) const { return has_positions ? positions[size_t(b * seq_k + rank)] : rank; }
  int64_t most(int64_t b) const {
    int64_t largest = 0;
    for (int64_t n = 0; n < seq_q; ++n) largest = std::max(largest, count(b, n));
    return largest;
  }

  /// Whether some row sees the key.
  bool is_seen(int64_t b, int64_t key_index) const {
    for (int64_t rank = 0; rank < most(b); ++rank)
      if (key(b, rank) == key_index) return true;
    return false;
  }

  ConstTensor visible() const {
    ConstTensor view = make_tensor(counts.data(), {batch, seq_q});
    view.stride[0] = seq_q + 2;
    return view;
  }
  ConstTensor places() const { return has_positions ? make_tensor(positions.data(), {batch, seq_k}) : ConstTensor(); }

  /// The column of a rank, as expand_values.h defines it.
  static int64_t column(int64_t rank, int64_t count, int64_t columns) {
    return ((2 * rank + 1) * columns - 1) / (2 * count);
  }
};

/// NaN for the keys [B, H, M, D] that no row sees, and for the queries [B, H, N, D] that see none.
static inline void spoil_unseen(const Ranked& ranked, Array& q, Array& k) {
  const auto spoil = [](Array& x, auto&& is_used) {
    const int64_t heads = x.view.shape[1], seq = x.view.shape[2], dim = x.view.shape[3];
    for (int64_t i = 0; i < x.size(); ++i)
      if (!is_used(i / dim / seq / heads, i / dim % seq)) x.set(i, NAN);
  };
  spoil(q, [&](int64_t b, int64_t n) { return ranked.count(b, n) > 0; });
  spoil(k, [&](int64_t b, int64_t m) { return ranked.is_seen(b, m); });
}

/// x_r = scale <q_n, k_r> for the ranks that row (b, h, n) sees.
template <class T>
std::vector<T> logits_of_row(const Ranked& ranked, const Array& q, const Array& k, double scale, int64_t b, int64_t h,
                             int64_t n) {
  const int64_t heads = q.view.shape[1], heads_kv = k.view.shape[1], dim = q.view.shape[3];
  const double* row = &q.values[size_t(((b * heads + h) * ranked.seq_q + n) * dim)];
  const T factor = T(scale == 0 ? 1 / std::sqrt(double(dim)) : scale);
  std::vector<T> x;
  for (int64_t rank = 0; rank < ranked.count(b, n); ++rank) {
    const double* key =
        &k.values[size_t(((b * heads_kv + h / (heads / heads_kv)) * ranked.seq_k + ranked.key(b, rank)) * dim)];
    T sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += T(row[d]) * T(key[d]);
    x.push_back(factor * sum);
  }
  return x;
}

/// The softmax of logits, and their logarithms.
template <class T>
struct SoftmaxRow {
  std::vector<T> p, log_p;

  explicit SoftmaxRow(const std::vector<T>& x) {
    if (x.empty()) return;
    const T top = *std::max_element(x.begin(), x.end());
    T total = 0;
    for (const T value : x) total += std::exp(value - top);
    for (const T value : x) {
      p.push_back(std::exp(value - top) / total);
      log_p.push_back(value - top - std::log(total));
    }
  }
};

/// Calls body(b, h, n) for the rows of [B, H, N], in order.
template <class F>
static void for_each_row(int64_t batch, int64_t heads, int64_t seq, F&& body) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t n = 0; n < seq; ++n) body(b, h, n);
}

}  // namespace check
