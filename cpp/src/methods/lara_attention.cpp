#include "subquad/lara_attention.h"

#include "core/philox.h"
#include "methods/composition.h"
#include "subquad/mixture_proposals.h"
#include "subquad/mixture_weights.h"
#include "subquad/segment_mean.h"
#include "subquad/sum_arrays.h"

namespace subquad {
namespace {

constexpr const char* kOp = "lara_attention";
constexpr const char* kOpBwd = "lara_attention_bwd";

/// One call: the checked arguments, and the steps that both passes share.
class Lara : public Composition {
 public:
  Lara(const char* op, const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const LaraOptions& options,
       const Workspace* workspace)
      : Composition(op, queue, q, k, v, workspace), o_(options) {
    check();
  }

  void forward(Tensor out, Tensor lse) {
    check_results(out, lse, {&o_.key_mask, &o_.query_mask, &o_.q_bar, &o_.k_bar, &o_.noise});
    propose();
    probe();
    weigh();
    const SoftmaxAttentionOptions options = read_options();
    softmax(q_, keys(), h_, options, out, lse);
  }

  void backward(ConstTensor dout, ConstTensor out, ConstTensor lse, const LaraGradients& g) {
    check_gradients(dout, out, lse,
                    {{"dq", g.dq, q_},
                     {"dk", g.dk, k_},
                     {"dv", g.dv, v_},
                     {"dq_bar", g.dq_bar, o_.q_bar},
                     {"dk_bar", g.dk_bar, o_.k_bar}},
                    {&o_.key_mask, &o_.query_mask, &o_.q_bar, &o_.k_bar, &o_.noise});
    propose();
    probe();
    weigh();
    const Tensor dq = scratch<float>({batch(), heads(), seq_q(), dim()}), dkeys = per_sample(dim());
    const Tensor dh = per_sample(dim_v()), dbias = scratch<float>({batch(), heads(), samples()});
    Tensor dalpha;
    if (optimal()) dalpha = scratch<float>({batch(), heads(), seq_q(), samples()});
    softmax_bwd(dout, {}, q_, keys(), h_, read_options(), out, lse, {dq, dkeys, dh, dbias, dalpha});
    const Tensor dk = scratch<float>({batch(), heads_kv(), seq_k(), dim()}), dw = per_sample(dim());
    softmax_bwd(dh, dbias, proposals_.w, k_, v_, probe_options(), h_, l_, {dw, dk, g.dv, {}, {}});
    const Tensor dq_bar = scratch<float>({batch(), heads(), landmarks(), dim()});
    backward_landmarks(dkeys, dw, dbias, dalpha, dq, dq_bar);
    finish(dq, dk, dq_bar, g);
  }

 private:
  int64_t landmarks() const { return o_.num_landmarks; }
  int64_t samples() const { return landmarks() * o_.samples_per_landmark; }
  bool given() const { return o_.q_bar.defined(); }
  bool optimal() const { return o_.mis == Mis::opt; }
  ConstTensor keys() const { return o_.mis == Mis::biased ? proposals_.keys : proposals_.w; }

  void check() {
    check_mask("key_mask", o_.key_mask, "M", seq_k());
    check_mask("query_mask", o_.query_mask, "N", seq_q());
    scale_ = scale_of(op_, o_.scale, dim());
    if (o_.noise_std == 0) o_.noise_std = 1 / std::sqrt(scale_);
    if (!(o_.noise_std > 0) || std::isinf(o_.noise_std))
      core::invalid(op_, "noise_std", "a finite number above 0", std::to_string(o_.noise_std));
    if (!std::isfinite(o_.alpha_coeff))
      core::invalid(op_, "alpha_coeff", "a finite number", std::to_string(o_.alpha_coeff));
    core::check_range(op_, "num_landmarks", o_.num_landmarks, 1, 1 << 20);
    core::check_range(op_, "samples_per_landmark", o_.samples_per_landmark, 1, 1 << 20);
    check_landmarks();
    check_noise();
  }

  void check_landmarks() {
    if (o_.q_bar.defined() != o_.k_bar.defined())
      core::invalid(op_, "landmarks", "q_bar and k_bar, or neither", "one of them");
    if (!given()) {
      o_.num_landmarks = std::min({o_.num_landmarks, seq_q(), seq_k()});
      return;
    }
    using core::kAny;
    core::check_array(op_, "landmarks q_bar", queue_, o_.q_bar,
                      {{"B", batch()}, {"H", heads()}, {"C", kAny}, {"D", dim()}}, {DType::f32, q_.dtype});
    const int64_t count = o_.q_bar.shape[2];
    core::check_array(op_, "landmarks k_bar", queue_, o_.k_bar,
                      {{"B", batch()}, {"Hkv", heads_kv()}, {"C", count}, {"D", dim()}}, {DType::f32, q_.dtype});
    if (o_.num_landmarks != LaraOptions().num_landmarks && o_.num_landmarks != count)
      core::invalid(op_, "num_landmarks", std::to_string(count) + " as in landmarks", std::to_string(o_.num_landmarks));
    o_.num_landmarks = count;
  }

  void check_noise() {
    if (o_.noise.defined()) {
      using core::kAny;
      core::check_array(op_, "noise", queue_, o_.noise, {{"B", batch()}, {"H", heads()}, {"J", kAny}, {"D", dim()}},
                        {DType::f32});
      const int64_t rows = o_.noise.shape[2];
      const bool fits = landmarks() == 0 ? rows == 0 : rows > 0 && rows % landmarks() == 0;
      if (!fits)
        core::invalid(op_, "noise", "J a multiple of the " + std::to_string(landmarks()) + " landmarks",
                      std::to_string(rows));
      const int64_t repeats = landmarks() == 0 ? 1 : rows / landmarks();
      if (o_.samples_per_landmark != 1 && o_.samples_per_landmark != repeats)
        core::invalid(op_, "samples_per_landmark", std::to_string(repeats) + " as in noise",
                      std::to_string(o_.samples_per_landmark));
      if (o_.antithetic) core::invalid(op_, "antithetic", "False with noise, which has every sample", "True");
      o_.samples_per_landmark = repeats;
      return;
    }
    if (!o_.draw && o_.samples_per_landmark != 1)
      core::invalid(op_, "samples_per_landmark", "1 without a seed or noise", std::to_string(o_.samples_per_landmark));
    if (o_.antithetic && !o_.draw) core::invalid(op_, "antithetic", "False without a seed", "True");
    if (o_.antithetic && o_.samples_per_landmark % 2)
      core::invalid(op_, "samples_per_landmark", "an even number with antithetic=True",
                    std::to_string(o_.samples_per_landmark));
  }

  Tensor per_sample(int64_t dim) { return scratch<float>({batch(), heads(), samples(), dim}); }

  SegmentMeanOptions segments(bool of_keys) const {
    SegmentMeanOptions options;
    options.num_segments = landmarks();
    options.mask = of_keys ? o_.key_mask : o_.query_mask;
    options.paired_mask = of_keys ? o_.query_mask : o_.key_mask;
    return options;
  }

  /// Landmarks by segment means where none are given.
  void take_landmarks() {
    if (given()) return;
    const Tensor q_bar = scratch<float>({batch(), heads(), landmarks(), dim()});
    const Tensor k_bar = scratch<float>({batch(), heads_kv(), landmarks(), dim()});
    o_.q_bar = q_bar, o_.k_bar = k_bar;
    if (landmarks() == 0) return;
    counts_ = scratch<int32_t>({batch(), landmarks()});
    segment(q_, segments(false), q_bar, {});
    segment(k_, segments(true), k_bar, counts_);
  }

  void segment(const ConstTensor& x, const SegmentMeanOptions& options, Tensor out, Tensor counts) {
    step([&] { return segment_mean_workspace_bytes(queue_, x, options, out, counts); },
         [&](Workspace w) { segment_mean(queue_, x, options, out, counts, w); });
  }

  MixtureProposalsOptions proposal_options() const {
    MixtureProposalsOptions options;
    options.scale = scale_;
    options.noise_std = o_.noise_std;
    options.antithetic = o_.antithetic;
    options.mis = o_.mis;
    options.counts = counts_;
    return options;
  }

  void propose() {
    own_landmarks_ = !given();
    take_landmarks();
    if (!o_.noise.defined() && o_.draw) {
      const int64_t rows = o_.antithetic ? samples() / 2 : samples();
      const Tensor noise = scratch<float>({1, heads(), rows, dim()});
      step([&] { random_normal(queue_, o_.seed, philox::kNoise, noise); });
      o_.noise = noise;
    }
    proposals_.w = per_sample(dim());
    if (o_.mis == Mis::biased) proposals_.keys = per_sample(dim());
    proposals_.log_density = scratch<float>({batch(), heads(), samples()});
    if (optimal()) proposals_.balance = scratch<float>({batch(), heads(), samples()});
    const MixtureProposalsOptions options = proposal_options();
    step([&] { return mixture_proposals_workspace_bytes(queue_, o_.q_bar, o_.k_bar, o_.noise, options, proposals_); },
         [&](Workspace w) { mixture_proposals(queue_, o_.q_bar, o_.k_bar, o_.noise, options, proposals_, w); });
  }

  SoftmaxAttentionOptions probe_options() const {
    SoftmaxAttentionOptions options;
    options.scale = scale_;
    options.key_norm_bias = -0.5 * scale_;
    options.key_mask = o_.key_mask;
    return options;
  }

  /// Stage 1: what each sample reads from the keys, and the bias L - log_density with which it is read.
  void probe() {
    h_ = per_sample(dim_v());
    l_ = scratch<float>({batch(), heads(), samples()});
    bias_ = scratch<float>({batch(), heads(), samples()});
    const SoftmaxAttentionOptions options = probe_options();
    softmax(proposals_.w, k_, v_, options, h_, l_);
    step([&] {
      sum_arrays(queue_, {{with_axis(l_, 3)}, {with_axis(proposals_.log_density, 3), -1.0}}, with_axis(bias_, 3));
    });
  }

  MixtureWeightsOptions weight_options() const {
    MixtureWeightsOptions options;
    options.scale = scale_;
    options.alpha_coeff = o_.alpha_coeff;
    options.over_queries = o_.t_over_queries;
    options.query_mask = o_.query_mask;
    options.counts = counts_;
    return options;
  }

  /// The weights alpha of every query for every sample.
  void weigh() {
    if (!optimal()) return;
    if (o_.t_over_queries) {
      column_lse_ = scratch<float>({batch(), heads(), landmarks()});
      SoftmaxAttentionOptions options;
      options.scale = scale_;
      options.key_mask = o_.query_mask;
      softmax(o_.q_bar, q_, {}, options, {}, column_lse_);
    }
    log_alpha_ = scratch<float>({batch(), heads(), seq_q(), samples()});
    const MixtureWeightsOptions options = weight_options();
    const ConstTensor balance = proposals_.balance;
    step(
        [&] {
          return mixture_weights_workspace_bytes(queue_, q_, o_.q_bar, column_lse_, balance, options, log_alpha_);
        },
        [&](Workspace w) { mixture_weights(queue_, q_, o_.q_bar, column_lse_, balance, options, log_alpha_, w); });
  }

  SoftmaxAttentionOptions read_options() const {
    SoftmaxAttentionOptions options;
    options.scale = scale_;
    options.key_bias = bias_;
    options.pair_bias = log_alpha_;
    options.query_mask = o_.query_mask;
    return options;
  }

  /// The gradient of the landmarks: dq_bar [B, H, C, D] that of mu, and in what follows that of q_bar alone; dq grows
  /// by what the weights alpha owe to the queries.
  void backward_landmarks(const Tensor& dkeys, const Tensor& dw, const Tensor& dbias, const Tensor& dalpha,
                          const Tensor& dq, const Tensor& dq_bar) {
    MixtureProposalsCotangents cotangents;
    if (optimal()) {
      const Tensor dq_weights = scratch<float>({batch(), heads(), seq_q(), dim()});
      const Tensor dbalance = scratch<float>({batch(), heads(), samples()});
      const MixtureWeightsOptions options = weight_options();
      const ConstTensor balance = proposals_.balance;
      step(
          [&] {
            return mixture_weights_bwd_workspace_bytes(queue_, dalpha, q_, o_.q_bar, column_lse_, balance, options,
                                                       dq_weights, dq_bar, dbalance);
          },
          [&](Workspace w) {
            mixture_weights_bwd(queue_, dalpha, q_, o_.q_bar, column_lse_, balance, options, dq_weights, dq_bar,
                                dbalance, w);
          });
      step([&] { sum_arrays(queue_, {{dq}, {dq_weights}}, dq); });
      cotangents.dbalance = dbalance;
    }
    const Tensor ddensity = scratch<float>({batch(), heads(), samples()});
    step([&] { sum_arrays(queue_, {{with_axis(dbias, 3), -1.0}}, with_axis(ddensity, 3)); });
    cotangents.dlog_density = ddensity;
    cotangents.dw = dw;
    if (o_.mis == Mis::biased)
      cotangents.dkeys = dkeys;
    else
      step([&] { sum_arrays(queue_, {{dw}, {dkeys}}, dw); });
    dmu_ = scratch<float>({batch(), heads(), landmarks(), dim()});
    const MixtureProposalsOptions options = proposal_options();
    step(
        [&] {
          return mixture_proposals_bwd_workspace_bytes(queue_, cotangents, o_.q_bar, o_.k_bar, o_.noise, options, dmu_);
        },
        [&](Workspace w) {
          mixture_proposals_bwd(queue_, cotangents, o_.q_bar, o_.k_bar, o_.noise, options, dmu_, w);
        });
  }

  /// Hands the gradients of the landmarks to the caller, or through the segment means to q and k.
  void finish(const Tensor& dq, const Tensor& dk, const Tensor& dq_bar, const LaraGradients& g) {
    const Tensor total = own_landmarks_ ? scratch<float>({batch(), heads(), landmarks(), dim()}) : g.dq_bar;
    const Tensor total_k = own_landmarks_ ? scratch<float>({batch(), heads_kv(), landmarks(), dim()}) : g.dk_bar;
    step([&] {
      if (optimal())
        sum_arrays(queue_, {{dmu_}, {dq_bar}}, total);
      else
        sum_arrays(queue_, {{dmu_}}, total);
      sum_arrays(queue_, {{dmu_}}, total_k);
    });
    if (own_landmarks_ && landmarks() > 0) {
      segment_bwd(total, dq, segments(false), g.dq);
      segment_bwd(total_k, dk, segments(true), g.dk);
    } else {
      step([&] { sum_arrays(queue_, {{dq}}, g.dq), sum_arrays(queue_, {{dk}}, g.dk); });
    }
  }

  void segment_bwd(const Tensor& dmeans, const Tensor& base, const SegmentMeanOptions& options, Tensor dx) {
    step([&] { return segment_mean_bwd_workspace_bytes(queue_, dmeans, base, options, dx); },
         [&](Workspace w) { segment_mean_bwd(queue_, dmeans, base, options, dx, w); });
  }

  LaraOptions o_;
  double scale_ = 0;
  bool own_landmarks_ = false;
  Tensor counts_;                        // [B, C] i32, of segment means
  MixtureProposals proposals_;           // [B, H, J, D] and [B, H, J]
  Tensor h_, l_, bias_;                  // [B, H, J, E], [B, H, J]
  Tensor column_lse_, log_alpha_, dmu_;  // [B, H, C], [B, H, N, J], [B, H, C, D]
};

}  // namespace

int64_t lara_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                       const LaraOptions& options, Tensor out, Tensor lse) {
  Lara call(kOp, queue, q, k, v, options, nullptr);
  call.forward(out, lse);
  return call.bytes();
}

void lara_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const LaraOptions& options,
                    Tensor out, Tensor lse, Workspace workspace) {
  core::check_workspace(kOp, workspace, lara_attention_workspace_bytes(queue, q, k, v, options, out, lse));
  Lara(kOp, queue, q, k, v, options, &workspace).forward(out, lse);
}

int64_t lara_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                           ConstTensor v, const LaraOptions& options, ConstTensor out, ConstTensor lse,
                                           const LaraGradients& gradients) {
  Lara call(kOpBwd, queue, q, k, v, options, nullptr);
  call.backward(dout, out, lse, gradients);
  return call.bytes();
}

void lara_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                        const LaraOptions& options, ConstTensor out, ConstTensor lse, const LaraGradients& gradients,
                        Workspace workspace) {
  core::check_workspace(kOpBwd, workspace,
                        lara_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, out, lse, gradients));
  Lara(kOpBwd, queue, q, k, v, options, &workspace).backward(dout, out, lse, gradients);
}

}  // namespace subquad
