#include "subquad/randomized_attention.h"

#include "core/philox.h"
#include "methods/composition.h"
#include "subquad/row_dot.h"
#include "subquad/sampled_proposals.h"
#include "subquad/softmax_sample.h"
#include "subquad/sum_arrays.h"

namespace subquad {
namespace {

constexpr const char* kOp = "randomized_attention";
constexpr const char* kOpBwd = "randomized_attention_bwd";

/// One call: the checked arguments, and the steps that both passes share.
class Randomized : public Composition {
 public:
  Randomized(const char* op, const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
             const RandomizedOptions& options, const Workspace* workspace)
      : Composition(op, queue, q, k, v, workspace), o_(options) {
    check();
  }

  void forward(Tensor out) {
    check_results(out, {}, {&o_.key_mask, &o_.indices, &o_.noise});
    propose();
    if (samples() == 1) return attend(0, out, {});
    const Tensor all = scratch<float>({batch(), heads() * samples(), seq_q(), dim_v()});
    for (int64_t s = 0; s < samples(); ++s) attend(s, of_sample(all, s), {});
    step([&] { sum_arrays(queue_, {{all, 1.0 / double(samples())}}, out); });
  }

  void backward(ConstTensor dout, Tensor dq, Tensor dk, Tensor dv) {
    check_gradients(dout, {}, {}, {{"dq", dq, q_}, {"dk", dk, k_}, {"dv", dv, v_}},
                    {&o_.key_mask, &o_.indices, &o_.noise});
    propose();
    const bool unbiased = o_.gradient == RandomizedGradient::unbiased;
    if (unbiased) take_baseline();
    const Tensor dw = scratch<float>({batch(), heads(), samples(), seq_q(), dim()});
    const Tensor dk_path = like_keys(dim()), dv_path = like_keys(dim_v());
    Tensor score;
    if (unbiased) score = scratch<float>({batch(), heads(), samples(), seq_q()});
    for (int64_t s = 0; s < samples(); ++s) backward_sample(s, dout, dw, dk_path, dv_path, score);
    const Tensor dq_draw = scratch<float>({batch(), heads(), seq_q(), dim()}), dk_draw = like_keys(dim());
    step(
        [&] {
          return sampled_proposals_bwd_workspace_bytes(queue_, dw, score, q_, k_, o_.indices, scale_, dq_draw, dk_draw);
        },
        [&](Workspace w) {
          sampled_proposals_bwd(queue_, dw, score, q_, k_, o_.indices, scale_, dq_draw, dk_draw, w);
        });
    const double mean = 1.0 / double(samples());
    step([&] { sum_arrays(queue_, {{dv_path, mean}}, dv); });
    if (!unbiased) {
      step([&] {
        sum_arrays(queue_, {{dq_draw, mean}}, dq);
        sum_arrays(queue_, {{dk_path, mean}, {dk_draw, mean}}, dk);
      });
      return;
    }
    const Tensor dq_score = scratch<float>({batch(), heads(), seq_q(), dim()}), dk_score = like_keys(dim());
    backward_score(score, dq_score, dk_score);
    step([&] {
      sum_arrays(queue_, {{dq_draw, mean}, {dq_score, mean}}, dq);
      sum_arrays(queue_, {{dk_path, mean}, {dk_draw, mean}, {dk_score, mean}}, dk);
    });
  }

 private:
  int64_t samples() const { return o_.num_samples; }

  void check() {
    check_mask("key_mask", o_.key_mask, "M", seq_k());
    scale_ = scale_of(op_, o_.scale, dim());
    if (o_.noise_std == 0) o_.noise_std = 1 / std::sqrt(scale_);
    if (!(o_.noise_std > 0) || std::isinf(o_.noise_std))
      core::invalid(op_, "noise_std", "a finite number above 0", std::to_string(o_.noise_std));
    if (o_.indices.defined() != o_.noise.defined())
      core::invalid(op_, o_.indices.defined() ? "noise" : "indices", "indices and noise, or neither", "one of them");
    if (o_.indices.defined()) check_draws();
    core::check_range(op_, "num_samples", o_.num_samples, 1, 1 << 20);
  }

  void check_draws() {
    using core::kAny;
    core::check_array(op_, "indices", queue_, o_.indices, {{"B", batch()}, {"H", heads()}, {"S", kAny}, {"N", seq_q()}},
                      {DType::i32});
    const int64_t given = o_.indices.shape[2];
    if (o_.num_samples != RandomizedOptions().num_samples && o_.num_samples != given)
      core::invalid(op_, "num_samples", std::to_string(given) + " as in indices", std::to_string(o_.num_samples));
    o_.num_samples = given;
    core::check_array(op_, "noise", queue_, o_.noise,
                      {{"B", batch()}, {"H", heads()}, {"S", given}, {"N", seq_q()}, {"D", dim()}}, {DType::f32});
  }

  Tensor like_keys(int64_t dim) { return scratch<float>({batch(), heads_kv(), k_.shape[2], dim}); }

  /// Draws what is not given and forms the samples w [B, H, S, N, D].
  void propose() {
    if (!o_.indices.defined()) {
      const Tensor indices = scratch<int32_t>({batch(), heads(), samples(), seq_q()});
      SoftmaxSampleOptions options;
      options.scale = scale_;
      options.num_samples = samples();
      options.key_mask = o_.key_mask;
      options.seed = o_.seed;
      step([&] { return softmax_sample_workspace_bytes(queue_, q_, k_, options, indices); },
           [&](Workspace w) { softmax_sample(queue_, q_, k_, options, indices, w); });
      const Tensor noise = scratch<float>({1, heads(), samples(), seq_q(), dim()});
      step([&] { random_normal(queue_, o_.seed, philox::kNoise, noise); });
      o_.indices = indices, o_.noise = noise;
    }
    w_ = scratch<float>({batch(), heads(), samples(), seq_q(), dim()});
    step([&] { sampled_proposals(queue_, q_, k_, o_.indices, o_.noise, o_.noise_std, w_); });
  }

  /// Sample s of an array [B, H, S, N, X] or [B, H * S, N, X], as [B, H, N, X].
  Tensor of_sample(const Tensor& all, int64_t s) const {
    const bool flat = all.rank == 4;
    const int64_t step_s = flat ? all.stride[1] : all.stride[2];
    Tensor one = make_tensor(static_cast<float*>(all.mutable_data()),
                             {batch(), heads(), seq_q(), all.shape[all.rank - 1]}, queue_.device);
    one.stride[0] = all.stride[0], one.stride[1] = samples() * step_s;
    one.data = static_cast<const float*>(all.data) + s * step_s;
    return one;
  }

  SoftmaxAttentionOptions attend_options() const {
    SoftmaxAttentionOptions options;
    options.scale = scale_;
    options.key_norm_bias = -0.5 * scale_;
    options.key_mask = o_.key_mask;
    return options;
  }

  void attend(int64_t s, Tensor out, Tensor lse) {
    const Tensor w = of_sample(w_, s);
    const SoftmaxAttentionOptions options = attend_options();
    softmax(w, k_, v_, options, out, lse);
  }

  SoftmaxAttentionOptions exact_options() const {
    SoftmaxAttentionOptions options;
    options.scale = scale_;
    options.key_mask = o_.key_mask;
    return options;
  }

  /// Exact attention and its lse: the baseline of the score-function term, which must not depend on the draw.
  void take_baseline() {
    baseline_ = scratch<float>({batch(), heads(), seq_q(), dim_v()});
    lse_ = scratch<float>({batch(), heads(), seq_q()});
    const SoftmaxAttentionOptions options = exact_options();
    softmax(q_, k_, v_, options, baseline_, lse_);
    sample_ = scratch<float>({batch(), heads(), seq_q(), dim_v()});
    sample_lse_ = scratch<float>({batch(), heads(), seq_q()});
  }

  /// dw of sample s, its part of dk and dv added up over the samples, and its score.
  void backward_sample(int64_t s, ConstTensor dout, const Tensor& dw, const Tensor& dk, const Tensor& dv,
                       const Tensor& score) {
    if (score.defined()) {
      attend(s, sample_, sample_lse_);
      Tensor scores = with_axis(score, 4);  // [B, H, S, N, 1]
      Tensor one = of_sample(scores, s);
      one.rank = 3;
      step([&] { row_dot(queue_, dout, sample_, baseline_, one); });
    }
    const bool first = s == 0;
    if (s == 1) dk_more_ = like_keys(dim()), dv_more_ = like_keys(dim_v());
    const SoftmaxAttentionGradients g = {of_sample(dw, s), first ? dk : dk_more_, first ? dv : dv_more_, {}, {}};
    softmax_bwd(dout, {}, of_sample(w_, s), k_, v_, attend_options(), sample_, sample_lse_, g);
    if (first) return;
    step([&] {
      sum_arrays(queue_, {{dk}, {dk_more_}}, dk);
      sum_arrays(queue_, {{dv}, {dv_more_}}, dv);
    });
  }

  /// The part of the score-function term that comes from the normaliser of the distribution of the keys: -c dlse.
  void backward_score(const Tensor& score, const Tensor& dq, const Tensor& dk) {
    const Tensor dlse = scratch<float>({batch(), heads(), seq_q()});
    Tensor flat = make_tensor(static_cast<float*>(score.mutable_data()), {batch(), heads() * samples(), seq_q(), 1},
                              queue_.device);
    step([&] { sum_arrays(queue_, {{flat, -1.0}}, with_axis(dlse, 3)); });
    softmax_bwd({}, dlse, q_, k_, {}, exact_options(), {}, lse_, {dq, dk, {}, {}, {}});
  }

  RandomizedOptions o_;
  double scale_ = 0;
  Tensor w_;                                     // [B, H, S, N, D]
  Tensor baseline_, lse_, sample_, sample_lse_;  // unbiased: [B, H, N, E], [B, H, N]
  Tensor dk_more_, dv_more_;                     // of the samples after the first
};

}  // namespace

int64_t randomized_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                             const RandomizedOptions& options, Tensor out) {
  Randomized call(kOp, queue, q, k, v, options, nullptr);
  call.forward(out);
  return call.bytes();
}

void randomized_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                          const RandomizedOptions& options, Tensor out, Workspace workspace) {
  core::check_workspace(kOp, workspace, randomized_attention_workspace_bytes(queue, q, k, v, options, out));
  Randomized(kOp, queue, q, k, v, options, &workspace).forward(out);
}

int64_t randomized_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                                 ConstTensor v, const RandomizedOptions& options, Tensor dq, Tensor dk,
                                                 Tensor dv) {
  Randomized call(kOpBwd, queue, q, k, v, options, nullptr);
  call.backward(dout, dq, dk, dv);
  return call.bytes();
}

void randomized_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                              const RandomizedOptions& options, Tensor dq, Tensor dk, Tensor dv, Workspace workspace) {
  core::check_workspace(kOpBwd, workspace,
                        randomized_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, dq, dk, dv));
  Randomized(kOpBwd, queue, q, k, v, options, &workspace).backward(dout, dq, dk, dv);
}

}  // namespace subquad
