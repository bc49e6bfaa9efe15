/// Problems for sparse_attention and their answers: the equation evaluated in double and in float over lists of entries.
#pragma once
#include "arrays.h"
#include "subquad/sparse_attention.h"

namespace sparse {

using namespace subquad;
using check::Array, check::Layout;

constexpr double kInfinity = INFINITY;

struct Entry {
  int64_t key;
  double log_weight;
};
using Rows = std::vector<std::vector<Entry>>;  // of (b, h, n), flattened

struct Sizes {
  int64_t b, h, hkv, n, m, d, e;
  DType dtype = DType::f32;
  Layout layout = Layout::dense;
  bool factors = false;      // row_scale, mix and query_mask
  int64_t context_rows = 0;  // 0: no context
  bool log_weights = false;
};

/// A matrix in one of the forms of a SparsePattern, and the entries it stands for.
struct Pattern {
  std::vector<int32_t> indices, visible, positions, indptr_i32;
  std::vector<int64_t> indptr;
  std::vector<uint8_t> bits;
  Array log_weights;
  SparsePattern view;
  Rows rows;
};

/// Lists of `slots` keys each; some slots are -1, and keys may repeat.
static inline Pattern index_pattern(const Sizes& s, int64_t heads, int64_t slots, unsigned seed = 1,
                                    double none = 0.2) {
  std::mt19937 random(seed);
  Pattern p;
  const int64_t count = s.b * heads * s.n * slots;
  for (int64_t i = 0; i < count; ++i)
    p.indices.push_back(s.m == 0 || double(random() % 1000) < none * 1000 ? -1 : int32_t(random() % unsigned(s.m)));
  p.view.indices = make_tensor(static_cast<const int32_t*>(p.indices.data()), {s.b, heads, s.n, slots});
  if (s.log_weights) {
    p.log_weights = Array({s.b, heads, s.n, slots}, DType::f32, s.layout);
    for (int64_t i = 0; i < count; ++i)
      p.log_weights.set(i, random() % 8 == 0 ? -kInfinity : double(random() % 1000) / 500 - 1);
    p.view.log_weights = p.log_weights.view;
  }
  for (int64_t r = 0; r < s.b * s.h * s.n; ++r) {
    const int64_t b = r / s.n / s.h, head = r / s.n % s.h / (s.h / heads), row = (b * heads + head) * s.n + r % s.n;
    p.rows.emplace_back();
    for (int64_t i = row * slots; i < (row + 1) * slots; ++i)
      if (p.indices[size_t(i)] >= 0)
        p.rows.back().push_back({p.indices[size_t(i)], s.log_weights ? p.log_weights.values[size_t(i)] : 0});
  }
  return p;
}

/// Entries given out, as CSR.
static inline Pattern csr_pattern(const Rows& rows, bool log_weights, bool narrow) {
  Pattern p;
  p.rows = rows;
  p.indptr.push_back(0);
  for (const auto& row : rows) {
    for (const Entry& entry : row) p.indices.push_back(int32_t(entry.key));
    p.indptr.push_back(int64_t(p.indices.size()));
  }
  const int64_t nnz = int64_t(p.indices.size()), count = int64_t(p.indptr.size());
  p.indptr_i32.assign(p.indptr.begin(), p.indptr.end());
  p.view.indices = make_tensor(static_cast<const int32_t*>(p.indices.data()), {nnz});
  if (narrow)
    p.view.indptr = make_tensor(static_cast<const int32_t*>(p.indptr_i32.data()), {count});
  else
    p.view.indptr = make_tensor(static_cast<const int64_t*>(p.indptr.data()), {count});
  if (!log_weights) return p;
  p.log_weights = Array({nnz}, DType::f32);
  int64_t i = 0;
  for (const auto& row : rows)
    for (const Entry& entry : row) p.log_weights.set(i++, entry.log_weight);
  p.view.log_weights = p.log_weights.view;
  return p;
}

/// The same entries as lists, with -1 behind.
static inline Pattern padded_pattern(const Sizes& s, const Rows& rows) {
  Pattern p;
  p.rows = rows;
  size_t slots = 0;
  for (const auto& row : rows) slots = std::max(slots, row.size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < slots; ++i) p.indices.push_back(i < row.size() ? int32_t(row[i].key) : -1);
  }
  p.view.indices = make_tensor(static_cast<const int32_t*>(p.indices.data()), {s.b, s.h, s.n, int64_t(slots)});
  return p;
}

/// Each row sees about `lengths[row % ..]` ascending keys of its own choice.
static inline Rows random_rows(const Sizes& s, const std::vector<int64_t>& lengths, unsigned seed = 1) {
  std::mt19937 random(seed);
  Rows rows(size_t(s.b * s.h * s.n));
  std::vector<int64_t> keys(static_cast<size_t>(s.m));
  for (int64_t i = 0; i < s.m; ++i) keys[size_t(i)] = i;
  for (size_t r = 0; r < rows.size(); ++r) {
    std::shuffle(keys.begin(), keys.end(), random);
    const int64_t length = std::min(s.m, lengths[r % lengths.size()]);
    std::vector<int64_t> own(keys.begin(), keys.begin() + length);
    std::sort(own.begin(), own.end());
    for (int64_t key : own) {
      const double weight = random() % 8 == 0 ? -kInfinity : double(float(random() % 1000) / 500 - 1);
      rows[r].push_back({key, s.log_weights ? weight : 0});
    }
  }
  return rows;
}

enum class Seen { all, causal, random };

/// Columns chosen with probability `density`. With positions every other key of an item is skipped.
static inline Pattern block_pattern(const Sizes& s, int64_t columns, double density, int64_t cap, Seen seen,
                                    bool positions, unsigned seed = 1) {
  std::mt19937 random(seed);
  Pattern p;
  const int64_t bytes = (columns + 7) / 8, valid = positions ? s.m / 2 : s.m;
  for (int64_t i = 0; i < s.b * s.n; ++i) {
    const int64_t n = i % s.n + 1 + (s.m - s.n);
    const int64_t causal = std::max<int64_t>(0, positions ? n / 2 : n);
    p.visible.push_back(int32_t(seen == Seen::all      ? valid
                                : seen == Seen::causal ? std::min(valid, causal)
                                                       : int64_t(random()) % (valid + 1)));
  }
  for (int64_t i = 0; i < s.b * s.m; ++i) p.positions.push_back(i % s.m < valid ? int32_t(2 * (i % s.m)) + 1 : -7);
  for (int64_t r = 0; r < s.b * s.h * s.n; ++r) {
    const int64_t n = p.visible[size_t(r / s.n / s.h * s.n + r % s.n)];
    std::vector<uint8_t> row(size_t(bytes), 0);
    p.rows.emplace_back();
    for (int64_t c = 0; c < 8 * bytes; ++c) {
      if (double(random() % 1000) >= density * 1000) continue;
      row[size_t(c / 8)] = uint8_t(row[size_t(c / 8)] | 1 << c % 8);
      if (c >= columns) continue;
      const int64_t begin = (2 * c * n + columns) / (2 * columns), end = (2 * (c + 1) * n + columns) / (2 * columns);
      for (int64_t i = std::max(begin, end - cap); i < end; ++i)
        p.rows.back().push_back({positions ? p.positions[size_t(i)] : i, 0});
    }
    p.bits.insert(p.bits.end(), row.begin(), row.end());
  }
  p.view.bits = make_tensor(static_cast<const uint8_t*>(p.bits.data()), {s.b, s.h, s.n, bytes});
  p.view.visible = make_tensor(static_cast<const int32_t*>(p.visible.data()), {s.b, s.n});
  if (positions) p.view.positions = make_tensor(static_cast<const int32_t*>(p.positions.data()), {s.b, s.m});
  p.view.num_columns = columns, p.view.block_cap = cap;
  return p;
}

struct Problem {
  Sizes s;
  Array q, k, v, row_scale, mix, context, out, lse;
  std::vector<char> keep;
  SparseAttentionOptions options;

  explicit Problem(const Sizes& sizes, unsigned seed = 3) : s(sizes) {
    std::mt19937 random(seed);
    q = Array({s.b, s.h, s.n, s.d}, s.dtype, s.layout), k = Array({s.b, s.hkv, s.m, s.d}, s.dtype, s.layout);
    v = Array({s.b, s.hkv, s.m, s.e}, s.dtype, s.layout);
    out = Array({s.b, s.h, s.n, s.e}, s.dtype, s.layout), lse = Array({s.b, s.h, s.n}, DType::f32);
    for (Array* x : {&q, &k, &v}) x->fill_normal(random);
    if (s.factors) {
      row_scale = Array({s.b, s.h, s.n}, DType::f32), mix = Array({s.b, s.h, s.n}, DType::f32);
      row_scale.fill_normal(random), mix.fill_normal(random);
      options.row_scale = row_scale.view, options.mix = mix.view;
      for (int64_t i = 0; i < s.b * s.n; ++i) keep.push_back(random() % 5 != 0);
      options.query_mask = make_tensor(reinterpret_cast<const bool*>(keep.data()), {s.b, s.n});
    }
    if (s.context_rows) {
      context = Array({s.b, s.h, s.context_rows, s.e}, s.dtype, s.layout);
      context.fill_normal(random);
      options.context = context.view;
    }
  }

  bool kept(int64_t row) const { return keep.empty() || keep[size_t(row / s.n / s.h * s.n + row % s.n)]; }

  void forward(const SparsePattern& pattern, int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes =
        sparse_attention_workspace_bytes(queue, q.view, k.view, v.view, pattern, options, out.view, lse.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    sparse_attention(queue, q.view, k.view, v.view, pattern, options, out.view, lse.view, {workspace.data(), bytes});
  }
};

/// The equation, line by line.
template <class Real>
struct Reference {
  std::vector<double> out, lse;

  Reference(const Problem& p, const Rows& rows) {
    const Sizes& s = p.s;
    const Real scale = Real(p.options.scale == 0 ? 1 / std::sqrt(double(s.d)) : p.options.scale);
    for (int64_t r = 0; r < s.b * s.h * s.n; ++r) {
      const int64_t head = r / s.n, kv = head / s.h * s.hkv + head % s.h / (s.h / s.hkv);
      std::vector<Real> x, sum(size_t(s.e), Real(0));
      Real top = -Real(INFINITY), total = 0;
      std::vector<int64_t> keys;
      for (const Entry& entry : rows[size_t(r)]) {
        if (entry.log_weight == -kInfinity || !p.kept(r)) continue;
        Real dot = 0;
        for (int64_t c = 0; c < s.d; ++c)
          dot += Real(p.q.values[size_t(r * s.d + c)]) * Real(p.k.values[size_t((kv * s.m + entry.key) * s.d + c)]);
        x.push_back(scale * dot + Real(entry.log_weight)), keys.push_back(entry.key);
        top = x.back() > top ? x.back() : top;
      }
      for (size_t i = 0; i < keys.size(); ++i) {
        const Real weight = std::exp(x[i] - top);
        total += weight;
        for (int64_t c = 0; c < s.e; ++c)
          sum[size_t(c)] += weight * Real(p.v.values[size_t((kv * s.m + keys[i]) * s.e + c)]);
      }
      lse.push_back(keys.empty() ? -kInfinity : double(std::log(total) + top));
      for (int64_t c = 0; c < s.e; ++c)
        out.push_back(double(finish(p, r, c, keys.empty() ? 0 : sum[size_t(c)] / total)));
    }
  }

  static Real finish(const Problem& p, int64_t r, int64_t c, Real mean) {
    const Sizes& s = p.s;
    if (!p.kept(r)) return 0;
    const Real factor = s.factors ? Real(p.row_scale.values[size_t(r)]) : Real(1);
    const Real mix = s.factors ? Real(p.mix.values[size_t(r)]) : Real(1);
    Real result = mix * factor * mean;
    if (s.context_rows) {
      const int64_t row = s.context_rows == 1 ? r / s.n : r;
      result += (1 - mix) * Real(p.context.values[size_t(row * s.e + c)]);
    }
    return result;
  }
};

}  // namespace sparse
