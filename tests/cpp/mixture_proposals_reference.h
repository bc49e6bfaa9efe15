/// Problems for mixture_proposals with their answers: the equations of the header, evaluated in double and in float.
#pragma once
#include "arrays.h"
#include "subquad/mixture_proposals.h"

namespace mixture {

using namespace subquad;
using check::Array;
using check::Layout;

enum class Noise { none, own, shared, antithetic };

struct Sizes {
  int64_t batch, heads, heads_kv, c, repetitions, d;
  Mis mis = Mis::opt;
  Noise noise = Noise::own;
  bool missing = false;
  Layout layout = Layout::dense;
  DType dtype = DType::f32;
  double size = 0.7;  // of the elements
};

static inline std::string describe(const Sizes& s) {
  char text[120];
  std::snprintf(text, sizeof text, " (B %d, H %d/%d, C %d, R %d, D %d, mis %d, noise %d%s)", int(s.batch), int(s.heads),
                int(s.heads_kv), int(s.c), int(s.repetitions), int(s.d), int(s.mis), int(s.noise),
                s.missing ? ", missing" : "");
  return text;
}

struct Problem {
  Sizes s;
  int64_t samples;
  Array q_bar, k_bar, noise, w, keys, log_density, balance, dw, dkeys, dlog_density, dbalance, dmu;
  std::vector<int32_t> counts;
  MixtureProposalsOptions options;
  int64_t turn = 0;  // where the sums over D begin

  explicit Problem(const Sizes& sizes) : s(sizes), samples(s.c * (s.noise == Noise::none ? 1 : s.repetitions)) {
    q_bar = Array({s.batch, s.heads, s.c, s.d}, s.dtype, s.layout);
    k_bar = Array({s.batch, s.heads_kv, s.c, s.d}, s.dtype, s.layout);
    noise = Array(
        {s.noise == Noise::shared ? 1 : s.batch, s.heads, s.noise == Noise::antithetic ? samples / 2 : samples, s.d},
        DType::f32, s.layout);
    for (Array* x : {&w, &keys, &dw, &dkeys}) *x = Array({s.batch, s.heads, samples, s.d}, DType::f32, s.layout);
    for (Array* x : {&log_density, &balance, &dlog_density, &dbalance})
      *x = Array({s.batch, s.heads, samples}, DType::f32, s.layout);
    dmu = Array({s.batch, s.heads, s.c, s.d}, DType::f32, s.layout);
    std::mt19937 random(3);
    for (Array* x : {&q_bar, &k_bar}) x->fill_normal(random, s.size);
    for (Array* x : {&noise, &dw, &dkeys, &dlog_density, &dbalance}) x->fill_normal(random);
    options.noise_std = 1.25, options.mis = s.mis, options.antithetic = s.noise == Noise::antithetic;
    counts.assign(size_t(s.batch * s.c), 1);
    if (!s.missing) return;
    for (int32_t& count : counts) count = random() % 10 < 6 ? 4 : 0;
    counts[0] = 0;
    options.counts = make_tensor(static_cast<const int32_t*>(counts.data()), {s.batch, s.c});
    fill_hidden(NAN);
  }

  bool exists(int64_t b, int64_t c) const { return counts[size_t(b * s.c + c)] > 0; }
  bool sampled(int64_t i) const { return exists(i / samples / s.heads, i % samples % s.c); }  // i over [B, H, J]

  /// Everything that must have no effect.
  void fill_hidden(double x) {
    for (Array* a : {&q_bar, &k_bar})
      for (int64_t i = 0; i < a->size(); ++i)
        if (!exists(i / (a->view.shape[1] * s.c * s.d), i / s.d % s.c)) a->set(i, x);
    for (Array* a : {&dw, &dkeys})
      for (int64_t i = 0; i < a->size(); ++i)
        if (!sampled(i / s.d)) a->set(i, x);
    for (Array* a : {&dlog_density, &dbalance})
      for (int64_t i = 0; i < a->size(); ++i)
        if (!sampled(i)) a->set(i, x);
  }

  MixtureProposals results() const {
    MixtureProposals r = {w.view, {}, log_density.view, {}};
    if (s.mis == Mis::biased) r.keys = keys.view;
    if (s.mis == Mis::opt) r.balance = balance.view;
    return r;
  }

  ConstTensor given_noise() const { return s.noise == Noise::none ? ConstTensor() : ConstTensor(noise.view); }

  void forward(int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes =
        mixture_proposals_workspace_bytes(queue, q_bar.view, k_bar.view, given_noise(), options, results());
    std::vector<char> workspace(size_t(bytes), char(0xff));
    mixture_proposals(queue, q_bar.view, k_bar.view, given_noise(), options, results(), {workspace.data(), bytes});
  }

  MixtureProposalsCotangents cotangents() const {
    MixtureProposalsCotangents x = {dw.view, {}, dlog_density.view, {}};
    if (s.mis == Mis::biased) x.dkeys = dkeys.view;
    if (s.mis == Mis::opt) x.dbalance = dbalance.view;
    return x;
  }

  void backward(const MixtureProposalsCotangents& x, int threads = 2) {
    const Queue queue = Queue::cpu(threads);
    const int64_t bytes =
        mixture_proposals_bwd_workspace_bytes(queue, x, q_bar.view, k_bar.view, given_noise(), options, dmu.view);
    std::vector<char> workspace(size_t(bytes), char(0xff));
    mixture_proposals_bwd(queue, x, q_bar.view, k_bar.view, given_noise(), options, dmu.view,
                          {workspace.data(), bytes});
  }
};

/// The equations of the header, evaluated plainly in T; rows of landmarks that do not exist are 0.
template <class T>
struct Reference {
  std::vector<T> mu, w, keys, log_density, balance, dmu;

  explicit Reference(const Problem& p) : p(p) {
    const int64_t heads = p.s.batch * p.s.heads, d = p.s.d;
    mu.resize(size_t(heads * p.s.c * d)), dmu.resize(mu.size());
    w.resize(size_t(heads * p.samples * d)), keys.resize(w.size());
    log_density.resize(size_t(heads * p.samples), T(INFINITY)), balance.resize(log_density.size());
    for (int64_t i = 0; i < int64_t(mu.size()); ++i) {
      const int64_t head = i / (p.s.c * d), b = head / p.s.heads, group = p.s.heads / p.s.heads_kv;
      const int64_t kv = (b * p.s.heads_kv + head % p.s.heads / group) * p.s.c * d + i % (p.s.c * d);
      if (p.exists(b, i / d % p.s.c)) mu[size_t(i)] = T(p.q_bar.values[size_t(i)]) + T(p.k_bar.values[size_t(kv)]);
    }
    for (int64_t i = 0; i < heads * p.samples; ++i)
      if (p.sampled(i)) add_sample(i);
  }

 private:
  const Problem& p;

  T dot(const T* a, const T* b) const {
    T sum = 0;
    for (int64_t i = 0; i < p.s.d; ++i) {
      const int64_t d = (i + p.turn) % p.s.d;
      sum += a[d] * b[d];
    }
    return sum;
  }

  void add_sample(int64_t i) {
    const Sizes& s = p.s;
    const int64_t head = i / p.samples, j = i % p.samples, own = j % s.c, b = head / s.heads;
    const T scale = T(1 / std::sqrt(double(s.d)));
    const T* centre = &mu[size_t((head * s.c + own) * s.d)];
    T *row = &w[size_t(i * s.d)], *key = &keys[size_t(i * s.d)];
    const bool negated = s.noise == Noise::antithetic && j >= p.samples / 2;
    const int64_t noise_rows = p.noise.view.shape[2], noise_head = s.noise == Noise::shared ? head % s.heads : head;
    for (int64_t d = 0; d < s.d; ++d) {
      row[d] = centre[d];
      if (s.noise != Noise::none) {
        const int64_t from = (noise_head * noise_rows + (negated ? j - p.samples / 2 : j)) * s.d + d;
        row[d] += T(negated ? -1.25 : 1.25) * T(p.noise.values[size_t(from)]);
      }
      key[d] = s.mis == Mis::biased ? row[d] + centre[d] : row[d];
    }
    std::vector<T> l(size_t(s.c), T(-INFINITY)), dl(size_t(s.c));
    T largest = T(-INFINITY), sum = 0;
    for (int64_t c = 0; c < s.c; ++c) {
      if (!p.exists(b, c)) continue;
      const T* m = &mu[size_t((head * s.c + c) * s.d)];
      l[size_t(c)] = scale * dot(row, m) - scale * dot(m, m) / 2;
      largest = std::max(largest, l[size_t(c)]);
    }
    for (T x : l) sum += std::exp(x - largest);
    const T mixture = largest + std::log(sum), own_l = l[size_t(own)];
    log_density[size_t(i)] = s.mis == Mis::opt ? own_l : mixture;
    balance[size_t(i)] = s.mis == Mis::opt ? std::exp(own_l - mixture) / T(p.samples / s.c) : T(0);
    const T dlog_density = T(p.dlog_density.values[size_t(i)]);
    const T db = s.mis == Mis::opt ? T(p.dbalance.values[size_t(i)]) * balance[size_t(i)] : T(0);
    for (int64_t c = 0; c < s.c; ++c) {
      const T share = std::exp(l[size_t(c)] - mixture);
      dl[size_t(c)] = s.mis == Mis::opt ? -db * share : dlog_density * share;
    }
    if (s.mis == Mis::opt) dl[size_t(own)] += dlog_density + db;
    add_gradients(i, dl, scale);
  }

  void add_gradients(int64_t i, const std::vector<T>& dl, T scale) {
    const Sizes& s = p.s;
    const int64_t head = i / p.samples, own = i % p.samples % s.c;
    const T* row = &w[size_t(i * s.d)];
    for (int64_t d = 0; d < s.d; ++d) {
      T dw = T(p.dw.values[size_t(i * s.d + d)]);
      if (s.mis == Mis::biased) dw += 2 * T(p.dkeys.values[size_t(i * s.d + d)]);
      for (int64_t c = 0; c < s.c; ++c) {
        const T m = mu[size_t((head * s.c + c) * s.d + d)];
        dw += scale * dl[size_t(c)] * m;
        dmu[size_t((head * s.c + c) * s.d + d)] += scale * dl[size_t(c)] * (row[d] - m);
      }
      dmu[size_t((head * s.c + own) * s.d + d)] += dw;
    }
  }
};

}  // namespace mixture
