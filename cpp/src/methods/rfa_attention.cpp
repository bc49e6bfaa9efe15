#include "subquad/rfa_attention.h"

#include "core/philox.h"
#include "methods/composition.h"
#include "subquad/feature_map.h"
#include "subquad/orthogonal_projection.h"
#include "subquad/sum_arrays.h"

namespace subquad {
namespace {

constexpr const char* kOp = "rfa_attention";
constexpr const char* kOpBwd = "rfa_attention_bwd";

/// One call: the checked arguments, and the steps that both passes share.
class Rfa : public Composition {
 public:
  Rfa(const char* op, const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const RfaOptions& options,
      const LinearAttentionState& state, const Workspace* workspace)
      : Composition(op, queue, q, k, v, workspace), o_(options), state_(state) {
    check();
  }

  void forward(Tensor out, Tensor lse, const LinearAttentionState& new_state) {
    if (lse.defined()) expect_lse();
    check_results(out, lse, {&o_.key_mask, &o_.projection, &o_.gate});
    if (new_state.s.defined() && !o_.is_causal) core::invalid(op_, "new_state", "is_causal=True", "False");
    take_projection();
    if (two_softmaxes()) {
      probe();
      read(out, lse);
    } else {
      map_features();
      step([&] { return linear_attention_workspace_bytes(queue_, fq_, fk_, v_, linear_, state_, out, new_state); },
           [&](Workspace w) { linear_attention(queue_, fq_, fk_, v_, linear_, state_, out, new_state, w); });
    }
  }

  void backward(ConstTensor dout, ConstTensor out, ConstTensor lse, const RfaGradients& g) {
    if (lse.defined()) expect_lse();
    check_gradients(dout, out, lse, {{"dq", g.dq, q_}, {"dk", g.dk, k_}, {"dv", g.dv, v_}},
                    {&o_.key_mask, &o_.projection, &o_.gate, &g.dgate});
    if (g.dgate.defined() && !o_.gate.defined()) core::invalid(op_, "dgate", "a gate with it", "none");
    if (g.dprojection.defined()) check_dprojection(g);
    take_projection();
    if (two_softmaxes())
      backward_softmaxes(dout, out, lse, g);
    else
      backward_features(dout, g);
  }

 private:
  int64_t width() const { return feature_dim(o_.features, o_.num_features, dim()); }
  bool drawn() const { return o_.features != Features::elu; }
  bool exponential() const { return o_.features == Features::positive || o_.features == Features::hyperbolic; }
  /// A gate weighs keys by where the query stands, a causal query sees a part of them: both need the running sums.
  bool two_softmaxes() const { return exponential() && !o_.is_causal; }

  void check() {
    check_mask("key_mask", o_.key_mask, "M", seq_k());
    scale_ = scale_of(op_, o_.scale, dim());
    if (!drawn() && o_.scale != 0) core::invalid(op_, "scale", "none with features=\"elu\"", std::to_string(o_.scale));
    if (!drawn() && o_.num_features != RfaOptions().num_features)
      core::invalid(op_, "num_features", "none with features=\"elu\"", std::to_string(o_.num_features));
    if (o_.projection.defined()) check_projection();
    // Features themselves are only formed where linear_attention reads them, which takes 8192 of them.
    const int64_t most = two_softmaxes() ? 1 << 20 : 8192 / feature_dim(o_.features, 1, 1);
    if (drawn()) core::check_range(op_, "num_features", o_.num_features, 1, most);
    if (o_.gate.defined()) {
      if (!o_.is_causal) core::invalid(op_, "gate", "is_causal=True with it", "False");
      core::check_array(op_, "gate", queue_, o_.gate, {{"B", batch()}, {"Hkv", heads_kv()}, {"M", k_.shape[2]}},
                        {DType::f32});
    }
    if (state_.s.defined() && !o_.is_causal) core::invalid(op_, "state", "is_causal=True with it", "False");
  }

  void check_projection() {
    if (!drawn()) core::invalid(op_, "projection", "none with features=\"elu\"", "an array");
    if (o_.projection.rank == 2) o_.projection = with_axis(o_.projection, 0);
    core::check_array(op_, "projection", queue_, o_.projection, {{"Hkv", core::kAny}, {"F", core::kAny}, {"D", dim()}},
                      {DType::f32});
    const int64_t own = o_.projection.shape[0];
    if (own != 1 && own != heads_kv())
      core::invalid(op_, "projection", "a leading axis of 1 or Hkv = " + std::to_string(heads_kv()),
                    std::to_string(own));
    const RfaOptions defaults;
    const int64_t rows = o_.projection.shape[1];
    if (o_.num_features != defaults.num_features && o_.num_features != rows)
      core::invalid(op_, "num_features", std::to_string(rows) + " as in projection", std::to_string(o_.num_features));
    o_.num_features = rows;
  }

  void expect_lse() const {
    if (!two_softmaxes())
      core::invalid(op_, "lse", "positive or hyperbolic features that are not causal where it is given", "others");
  }

  void check_dprojection(const RfaGradients& g) {
    if (!drawn()) core::invalid(op_, "dprojection", "none with features=\"elu\"", "an array");
    dprojection_ = g.dprojection.rank == 2 ? with_axis(g.dprojection, 0) : g.dprojection;
    const int64_t own = o_.projection.defined() ? o_.projection.shape[0] : heads_kv();
    core::check_array(op_, "dprojection", queue_, dprojection_, {{"Hkv", own}, {"F", o_.num_features}, {"D", dim()}},
                      {DType::f32});
    core::check_output(op_, "dprojection", dprojection_,
                       {&q_, &k_, &v_, &o_.projection, &g.dq, &g.dk, &g.dv, &g.dgate});
  }

  void take_projection() {
    if (!drawn() || o_.projection.defined()) return;
    const Tensor rows = scratch<float>({heads_kv(), o_.num_features, dim()});
    if (o_.orthogonal)
      step([&] { return orthogonal_projection_workspace_bytes(queue_, o_.seed, ProjectionKind::haar, rows); },
           [&](Workspace w) { orthogonal_projection(queue_, o_.seed, ProjectionKind::haar, rows, w); });
    else
      step([&] { random_normal(queue_, o_.seed, philox::kProjection, rows); });
    o_.projection = rows;
  }

  /// The rows w of the two softmaxes, [B, Hkv, F', D] without memory of their own for the batch.
  void make_rows() {
    ConstTensor rows = with_axis(o_.projection, 0);  // [1, Hp, F, D]
    if (o_.features == Features::hyperbolic) {
      const int64_t f = o_.num_features;
      const Tensor both = scratch<float>({1, rows.shape[1], 2 * f, dim()});
      step([&] {
        sum_arrays(queue_, {{rows}}, cut(both, 2, 0, f));
        sum_arrays(queue_, {{rows, -1.0}}, cut(both, 2, f, f));
      });
      rows = both;
    }
    rows_ = repeated(repeated(rows, 0, batch()), 1, heads_kv());
  }

  SoftmaxAttentionOptions probe_options() const {
    SoftmaxAttentionOptions options;
    options.scale = std::sqrt(scale_);
    options.key_norm_bias = -0.5 * scale_;
    options.key_mask = o_.key_mask;
    return options;
  }

  SoftmaxAttentionOptions read_options() const {
    SoftmaxAttentionOptions options;
    options.scale = std::sqrt(scale_);
    options.key_bias = l_;
    return options;
  }

  /// Stage 1: what each feature row reads from the keys, h and L.
  void probe() {
    make_rows();
    h_ = scratch<float>({batch(), heads_kv(), width(), dim_v()});
    l_ = scratch<float>({batch(), heads_kv(), width()});
    const SoftmaxAttentionOptions options = probe_options();
    softmax(rows_, k_, v_, options, h_, l_);
  }

  /// Stage 2: what each query reads from the features.
  void read(Tensor out, Tensor lse) {
    const SoftmaxAttentionOptions options = read_options();
    softmax(q_, rows_, h_, options, out, lse);
  }

  void backward_softmaxes(ConstTensor dout, ConstTensor out, ConstTensor lse, const RfaGradients& g) {
    probe();
    const Tensor dh = scratch<float>({batch(), heads_kv(), width(), dim_v()});
    const Tensor dl = scratch<float>({batch(), heads_kv(), width()});
    const Tensor drows_read = scratch<float>({batch(), heads_kv(), width(), dim()});
    Tensor drows_probe;
    if (dprojection_.defined()) drows_probe = scratch<float>({batch(), heads_kv(), width(), dim()});
    softmax_bwd(dout, {}, q_, rows_, h_, read_options(), out, lse, {g.dq, drows_read, dh, dl, {}});
    softmax_bwd(dh, dl, rows_, k_, v_, probe_options(), h_, l_, {drows_probe, g.dk, g.dv, {}, {}});
    if (!dprojection_.defined()) return;
    const Tensor result = with_axis(dprojection_, 0);  // [1, Hp, F, D]
    const int64_t f = o_.num_features;
    if (o_.features == Features::hyperbolic)
      step([&] {
        sum_arrays(queue_,
                   {{cut(drows_read, 2, 0, f)},
                    {cut(drows_probe, 2, 0, f)},
                    {cut(drows_read, 2, f, f), -1.0},
                    {cut(drows_probe, 2, f, f), -1.0}},
                   result);
      });
    else
      step([&] { sum_arrays(queue_, {{drows_read}, {drows_probe}}, result); });
  }

  FeatureMapOptions map_options(bool keys) const {
    FeatureMapOptions options;
    options.features = o_.features;
    if (drawn()) options.scale = scale_;
    options.log = exponential();
    if (keys) options.mask = o_.key_mask;
    return options;
  }

  /// Features of queries and keys, and how linear_attention is to take them.
  void map_features() {
    fq_ = scratch<float>({batch(), heads(), q_.shape[2], width()});
    fk_ = scratch<float>({batch(), heads_kv(), k_.shape[2], width()});
    Tensor factor;
    // The factor of a query cancels, that of a key does not.
    if (o_.features == Features::trig) factor = scratch<float>({batch(), heads_kv(), k_.shape[2]});
    map(q_, false, fq_, {});
    map(k_, true, fk_, factor);
    linear_.log_features = exponential();
    linear_.key_log_weight = factor;
    linear_.key_mask = o_.key_mask;
    linear_.is_causal = o_.is_causal;
    linear_.gate = o_.gate;
  }

  void map(const ConstTensor& x, bool keys, Tensor out, Tensor factor) {
    const FeatureMapOptions options = map_options(keys);
    step([&] { return feature_map_workspace_bytes(queue_, x, o_.projection, options, out, factor); },
         [&](Workspace w) { feature_map(queue_, x, o_.projection, options, out, factor, w); });
  }

  void map_bwd(ConstTensor dout, ConstTensor dfactor, const ConstTensor& x, bool keys, Tensor dx, Tensor drows) {
    const FeatureMapOptions options = map_options(keys);
    step([&] { return feature_map_bwd_workspace_bytes(queue_, dout, dfactor, x, o_.projection, options, dx, drows); },
         [&](Workspace w) { feature_map_bwd(queue_, dout, dfactor, x, o_.projection, options, dx, drows, w); });
  }

  void backward_features(ConstTensor dout, const RfaGradients& g) {
    map_features();
    LinearAttentionGradients linear = {scratch<float>({batch(), heads(), q_.shape[2], width()}),
                                       scratch<float>({batch(), heads_kv(), k_.shape[2], width()}),
                                       g.dv,
                                       {},
                                       g.dgate};
    if (linear_.key_log_weight.defined()) linear.dkey_log_weight = scratch<float>({batch(), heads_kv(), k_.shape[2]});
    step([&] { return linear_attention_bwd_workspace_bytes(queue_, dout, fq_, fk_, v_, linear_, state_, linear); },
         [&](Workspace w) { linear_attention_bwd(queue_, dout, fq_, fk_, v_, linear_, state_, linear, w); });
    Tensor from_q, from_k;
    if (dprojection_.defined()) {
      from_q = scratch<float>({dprojection_.shape[0], o_.num_features, dim()});
      from_k = scratch<float>({dprojection_.shape[0], o_.num_features, dim()});
    }
    map_bwd(linear.dfq, {}, q_, false, g.dq, from_q);
    map_bwd(linear.dfk, linear.dkey_log_weight, k_, true, g.dk, from_k);
    if (dprojection_.defined())
      step([&] { sum_arrays(queue_, {{with_axis(from_q, 0)}, {with_axis(from_k, 0)}}, with_axis(dprojection_, 0)); });
  }

  RfaOptions o_;
  LinearAttentionState state_;
  double scale_ = 0;
  Tensor dprojection_;
  ConstTensor rows_;  // two softmaxes: [B, Hkv, F', D]
  Tensor h_, l_;      // and [B, Hkv, F', E], [B, Hkv, F']
  Tensor fq_, fk_;    // features: [B, H, N, F'], [B, Hkv, M, F']
  LinearAttentionOptions linear_;
};

}  // namespace

int64_t rfa_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                      const RfaOptions& options, const LinearAttentionState& state, Tensor out,
                                      Tensor lse, const LinearAttentionState& new_state) {
  Rfa call(kOp, queue, q, k, v, options, state, nullptr);
  call.forward(out, lse, new_state);
  return call.bytes();
}

void rfa_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const RfaOptions& options,
                   const LinearAttentionState& state, Tensor out, Tensor lse, const LinearAttentionState& new_state,
                   Workspace workspace) {
  core::check_workspace(kOp, workspace,
                        rfa_attention_workspace_bytes(queue, q, k, v, options, state, out, lse, new_state));
  Rfa(kOp, queue, q, k, v, options, state, &workspace).forward(out, lse, new_state);
}

int64_t rfa_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                          ConstTensor v, const RfaOptions& options, const LinearAttentionState& state,
                                          ConstTensor out, ConstTensor lse, const RfaGradients& gradients) {
  Rfa call(kOpBwd, queue, q, k, v, options, state, nullptr);
  call.backward(dout, out, lse, gradients);
  return call.bytes();
}

void rfa_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                       const RfaOptions& options, const LinearAttentionState& state, ConstTensor out, ConstTensor lse,
                       const RfaGradients& gradients, Workspace workspace) {
  core::check_workspace(kOpBwd, workspace,
                        rfa_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, state, out, lse, gradients));
  Rfa(kOpBwd, queue, q, k, v, options, state, &workspace).backward(dout, out, lse, gradients);
}

}  // namespace subquad
