/// Gradients of the problems of sparse_attention_reference.h: the equations in double and in float, entry by entry.
#pragma once
#include "sparse_attention_reference.h"

namespace sparse {

struct Backward : Problem {
  Array dout, dlse, dq, dk, dv, drow_scale, dmix, dcontext;
  bool with_dlse;

  explicit Backward(const Sizes& sizes, bool dlse_given = false, bool f32_gradients = false)
      : Problem(sizes), with_dlse(dlse_given) {
    std::mt19937 random(9);
    const DType dtype = f32_gradients ? DType::f32 : s.dtype;
    dout = Array({s.b, s.h, s.n, s.e}, s.dtype, s.layout), dlse = Array({s.b, s.h, s.n}, DType::f32);
    dout.fill_normal(random), dlse.fill_normal(random);
    dq = Array({s.b, s.h, s.n, s.d}, dtype, s.layout), dk = Array({s.b, s.hkv, s.m, s.d}, dtype, s.layout);
    dv = Array({s.b, s.hkv, s.m, s.e}, dtype, s.layout);
    drow_scale = Array({s.b, s.h, s.n}, DType::f32), dmix = Array({s.b, s.h, s.n}, DType::f32);
    if (s.context_rows) dcontext = Array({s.b, s.h, s.context_rows, s.e}, dtype, s.layout);
  }

  SparseAttentionGradients gradients() const {
    return {dq.view, dk.view, dv.view, drow_scale.view, dmix.view, dcontext.view};
  }

  void run(const SparsePattern& pattern, int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const ConstTensor lse_gradient = with_dlse ? ConstTensor(dlse.view) : ConstTensor();
    const int64_t bytes = sparse_attention_bwd_workspace_bytes(queue, dout.view, lse_gradient, q.view, k.view, v.view,
                                                               pattern, options, gradients());
    std::vector<char> workspace(size_t(bytes), char(0xff));
    sparse_attention_bwd(queue, dout.view, lse_gradient, q.view, k.view, v.view, pattern, options, gradients(),
                         {workspace.data(), bytes});
  }

  void run(const Pattern& pattern, int threads = 2) {
    options.max_entries = 0;
    for (const auto& row : pattern.rows) options.max_entries += int64_t(row.size());
    run(pattern.view, threads);
  }

  std::vector<float> results() const {
    std::vector<float> all;
    for (const Array* a : {&dq, &dk, &dv, &drow_scale, &dmix, &dcontext}) {
      const std::vector<float> floats = a->floats();
      all.insert(all.end(), floats.begin(), floats.end());
    }
    return all;
  }
};

/// The sums in the order of rows and entries, or in the opposite order.
template <class Real>
struct GradientReference {
  std::vector<double> dq, dk, dv, drow_scale, dmix, dcontext;

  GradientReference(const Backward& p, const Rows& rows, bool reversed = false)
      : p_(p), s_(p.s), scale_(Real(p.options.scale == 0 ? 1 / std::sqrt(double(s_.d)) : p.options.scale)) {
    dq_.resize(size_t(p.q.size())), dk_.resize(size_t(p.k.size())), dv_.resize(size_t(p.v.size()));
    dcontext_.resize(size_t(p.context.size()));
    drow_scale.resize(rows.size()), dmix.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const size_t r = reversed ? rows.size() - 1 - i : i;
      std::vector<Entry> row = rows[r];
      if (reversed) std::reverse(row.begin(), row.end());
      if (p.kept(int64_t(r))) add_row(int64_t(r), row);
    }
    for (Real& x : dq_) x *= scale_;
    for (Real& x : dk_) x *= scale_;
    dq.assign(dq_.begin(), dq_.end()), dk.assign(dk_.begin(), dk_.end()), dv.assign(dv_.begin(), dv_.end());
    dcontext.assign(dcontext_.begin(), dcontext_.end());
  }

 private:
  static Real dot(const Array& a, int64_t i, const Array& b, int64_t j, int64_t dim) {
    Real sum = 0;
    for (int64_t c = 0; c < dim; ++c) sum += Real(a.values[size_t(i * dim + c)]) * Real(b.values[size_t(j * dim + c)]);
    return sum;
  }

  static void add(std::vector<Real>& to, int64_t i, Real weight, const Array& from, int64_t j, int64_t dim) {
    for (int64_t c = 0; c < dim; ++c) to[size_t(i * dim + c)] += weight * Real(from.values[size_t(j * dim + c)]);
  }

  void add_row(int64_t r, const std::vector<Entry>& row) {
    const int64_t head = r / s_.n, kv = head / s_.h * s_.hkv + head % s_.h / (s_.h / s_.hkv);
    const Real scale_of_row = s_.factors ? Real(p_.row_scale.values[size_t(r)]) : Real(1);
    const Real mix = s_.factors ? Real(p_.mix.values[size_t(r)]) : Real(1);
    const Real dlse = p_.with_dlse ? Real(p_.dlse.values[size_t(r)]) : Real(0);
    std::vector<int64_t> keys;
    std::vector<Real> x, g;
    Real top = -Real(INFINITY), total = 0, mean = 0;
    for (const Entry& entry : row) {
      if (entry.log_weight == -kInfinity) continue;
      keys.push_back(kv * s_.m + entry.key);
      x.push_back(scale_ * dot(p_.q, r, p_.k, keys.back(), s_.d) + Real(entry.log_weight));
      g.push_back(dot(p_.dout, r, p_.v, keys.back(), s_.e));
      top = std::max(top, x.back());
    }
    for (Real& value : x) value = std::exp(value - top), total += value;
    for (size_t i = 0; i < x.size(); ++i) x[i] /= total, mean += x[i] * g[i];
    for (size_t i = 0; i < x.size(); ++i) {
      const Real dx = x[i] * (mix * scale_of_row * (g[i] - mean) + dlse);
      add(dq_, r, dx, p_.k, keys[i], s_.d);
      add(dk_, keys[i], dx, p_.q, r, s_.d);
      add(dv_, keys[i], mix * scale_of_row * x[i], p_.dout, r, s_.e);
    }
    drow_scale[size_t(r)] = double(mix * mean);
    Real of_context = 0;
    if (s_.context_rows) {
      const int64_t at = s_.context_rows == 1 ? head : r;
      of_context = dot(p_.dout, r, p_.context, at, s_.e);
      add(dcontext_, at, 1 - mix, p_.dout, r, s_.e);
    }
    dmix[size_t(r)] = double(scale_of_row * mean - of_context);
  }

  const Backward& p_;
  const Sizes& s_;
  const Real scale_;
  std::vector<Real> dq_, dk_, dv_, dcontext_;
};

}  // namespace sparse
