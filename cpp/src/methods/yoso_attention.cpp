#include "subquad/yoso_attention.h"

#include "core/philox.h"
#include "methods/composition.h"
#include "subquad/bucket_attention.h"
#include "subquad/l2_normalize.h"

namespace subquad {
namespace {

constexpr const char* kOp = "yoso_attention";
constexpr const char* kOpBwd = "yoso_attention_bwd";

/// The view with a leading axis of extent 1 if it has rank `rank` - 1.
ConstTensor with_leading_axis(const ConstTensor& t, int rank) {
  return t.defined() && t.rank == rank - 1 ? with_axis(t, 0) : t;
}

/// One call: the checked arguments, and the steps that both passes share.
class Yoso : public Composition {
 public:
  Yoso(const char* op, const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const YosoOptions& options,
       Workspace* workspace)
      : Composition(op, queue, q, k, v, workspace), o_(options) {
    check();
  }

  void forward(Tensor out, Tensor lse) {
    if (lse.defined() && !o_.normalize)
      core::invalid(op_, "lse", "normalize=True where it is asked for", "normalize=False");
    check_results(out, lse, {&o_.key_mask, &o_.query_mask, &o_.planes, &o_.signs});
    if (!o_.expectation) hash();
    attend_normalized(out, lse);
  }

  void backward(ConstTensor dout, ConstTensor out, ConstTensor lse, Tensor dq, Tensor dk, Tensor dv) {
    if (lse.defined() && !o_.normalize) core::invalid(op_, "lse", "none with normalize=False", "an array");
    check_gradients(dout, out, lse, {{"dq", dq, q_}, {"dk", dk, k_}, {"dv", dv, v_}},
                    {&o_.key_mask, &o_.query_mask, &o_.planes, &o_.signs});
    if (!o_.expectation) hash();
    if (o_.normalize) dout = pull_back(dout, out, lse);
    const YosoGradient gradient = rule();
    const bool sampled = gradient == YosoGradient::sampled || gradient == YosoGradient::sampled_exact;
    if (!o_.expectation) attend_bwd(dout, dv);
    if (sampled)
      sampled_gradient(dout, gradient, dq, dk);
    else
      dense_gradient(dout, gradient, dq, dk, o_.expectation ? dv : Tensor{});
  }

 private:
  void check() {
    check_mask("key_mask", o_.key_mask, "M", seq_k());
    check_mask("query_mask", o_.query_mask, "N", seq_q());
    check_hashing();
    core::check_range(op_, "num_hashes", o_.num_hashes, 1, 65536);
    core::check_range(op_, "hash_bits", o_.hash_bits, 1, 24);
    const YosoGradient g = o_.gradient;
    if (o_.expectation && (g == YosoGradient::sampled || g == YosoGradient::sampled_exact))
      core::invalid(op_, "grad", "\"exact\" or \"lower_bound\" with expectation=True", "a sampled gradient");
  }

  void check_hashing() {
    if (o_.planes.defined() && o_.signs.defined()) core::invalid(op_, "signs", "planes or signs", "both");
    if (o_.expectation && (o_.planes.defined() || o_.signs.defined()))
      core::invalid(op_, o_.planes.defined() ? "planes" : "signs", "none with expectation=True, which draws nothing",
                    "an array");
    if (o_.planes.defined()) check_planes();
    if (o_.signs.defined()) check_signs();
  }

  void check_planes() {
    o_.planes = with_leading_axis(o_.planes, 4);
    core::check_array(op_, "planes", queue_, o_.planes,
                      {{"Hkv", core::kAny}, {"num_hashes", core::kAny}, {"hash_bits", core::kAny}, {"D", dim()}},
                      {DType::f32});
    check_plane_heads("planes", o_.planes.shape[0]);
    const YosoOptions defaults;
    adopt("num_hashes", &o_.num_hashes, defaults.num_hashes, o_.planes.shape[1]);
    adopt("hash_bits", &o_.hash_bits, defaults.hash_bits, o_.planes.shape[2]);
    o_.hashing = Hashing::gaussian;
  }

  void check_signs() {
    if (o_.hashing == Hashing::gaussian) core::invalid(op_, "signs", "planes with hashing=\"gaussian\"", "signs");
    core::check_range(op_, "num_hashes", o_.num_hashes, 1, 65536);
    core::check_range(op_, "hash_bits", o_.hash_bits, 1, 24);
    o_.signs = with_leading_axis(o_.signs, 4);
    core::check_array(
        op_, "signs", queue_, o_.signs,
        {{"Hkv", o_.signs.rank == 4 ? o_.signs.shape[0] : 1}, {"3", 3}, {"P", parts()}, {"D2", hadamard_padded(dim())}},
        {DType::f32});
    check_plane_heads("signs", o_.signs.shape[0]);
  }

  void check_plane_heads(const char* argument, int64_t plane_heads) {
    if (plane_heads != 1 && plane_heads != heads_kv())
      core::invalid(op_, argument, "a leading axis of 1 or Hkv = " + std::to_string(heads_kv()),
                    std::to_string(plane_heads));
  }

  /// A count that an explicit array determines: the default gives way, another value must agree.
  void adopt(const char* name, int64_t* value, int64_t fallback, int64_t determined) {
    if (*value != fallback && *value != determined)
      core::invalid(op_, name, std::to_string(determined) + " as in planes", std::to_string(*value));
    *value = determined;
  }

  int64_t parts() const { return hadamard_parts(o_.num_hashes, o_.hash_bits, dim(), o_.carving); }

  YosoGradient rule() const {
    if (o_.gradient != YosoGradient::automatic) return o_.gradient;
    return o_.expectation ? YosoGradient::exact : YosoGradient::sampled;
  }

  Tensor codes(int64_t heads, int64_t seq) {
    if (o_.hash_bits <= 16) return scratch<uint16_t>({batch(), heads, o_.num_hashes, seq});
    return scratch<int32_t>({batch(), heads, o_.num_hashes, seq});
  }

  /// Draws what is not given and hashes queries and keys with it.
  void hash() {
    codes_q_ = codes(heads(), seq_q());
    codes_k_ = codes(heads_kv(), seq_k());
    const bool gaussian = o_.hashing == Hashing::gaussian;
    ConstTensor random = gaussian ? o_.planes : o_.signs;
    if (!random.defined()) random = gaussian ? draw_planes() : draw_signs();
    for (bool keys : {false, true}) {
      const ConstTensor& x = keys ? k_ : q_;
      const Tensor& out = keys ? codes_k_ : codes_q_;
      step(
          [&] {
            return gaussian ? lsh_hash_workspace_bytes(queue_, x, random, out)
                            : lsh_hash_hadamard_workspace_bytes(queue_, x, random, o_.hash_bits, o_.carving, out);
          },
          [&](Workspace w) {
            if (gaussian)
              lsh_hash(queue_, x, random, out, w);
            else
              lsh_hash_hadamard(queue_, x, random, o_.hash_bits, o_.carving, out, w);
          });
    }
  }

  ConstTensor draw_planes() {
    const Tensor planes = scratch<float>({heads_kv(), o_.num_hashes, o_.hash_bits, dim()});
    Tensor rows = planes;  // [Hkv, m * tau, D], the shape that fixes the counters
    rows.rank = 3;
    rows.shape[1] = o_.num_hashes * o_.hash_bits, rows.shape[2] = dim();
    rows.stride[1] = dim(), rows.stride[2] = 1;
    if (run_) random_normal(queue_, o_.seed, philox::kPlanes, rows);
    return planes;
  }

  ConstTensor draw_signs() {
    const int64_t padded = hadamard_padded(dim());
    const Tensor signs = scratch<float>({heads_kv(), 3, parts(), padded});
    Tensor rows = signs;  // [Hkv, 3 * P, D2]
    rows.rank = 3;
    rows.shape[1] = 3 * parts(), rows.shape[2] = padded;
    rows.stride[1] = padded, rows.stride[2] = 1;
    if (run_) random_signs(queue_, o_.seed, philox::kSigns, rows);
    return signs;
  }

  BucketAttentionOptions bucket_options() const {
    BucketAttentionOptions options;
    options.num_buckets = int64_t(1) << o_.hash_bits;
    options.scale = 1.0 / double(o_.num_hashes);
    options.is_causal = o_.is_causal;
    options.key_mask = o_.key_mask;
    options.query_mask = o_.query_mask;
    return options;
  }

  CollisionAttentionOptions collision_options() const {
    return {o_.hash_bits, o_.is_causal, o_.key_mask, o_.query_mask};
  }

  /// X, the sum before normalisation.
  void attend(Tensor sum) {
    if (o_.expectation)
      step([&] { return collision_attention_workspace_bytes(queue_, q_, k_, v_, collision_options(), sum); },
           [&](Workspace w) { collision_attention(queue_, q_, k_, v_, collision_options(), sum, w); });
    else
      step([&] { return bucket_attention_workspace_bytes(queue_, codes_q_, codes_k_, v_, bucket_options(), sum); },
           [&](Workspace w) { bucket_attention(queue_, codes_q_, codes_k_, v_, bucket_options(), sum, w); });
  }

  void attend_normalized(Tensor out, Tensor lse) {
    if (!o_.normalize) return attend(out);
    // A 16-bit sum would be rounded twice, and may overflow before it is normalised.
    const Tensor sum = out.dtype == DType::f32 ? out : scratch<float>({batch(), heads(), seq_q(), dim_v()});
    attend(sum);
    if (run_) l2_normalize(queue_, sum, out, lse);
  }

  /// The gradient of X from that of X / |X|.
  ConstTensor pull_back(ConstTensor dout, ConstTensor out, ConstTensor lse) {
    if (!out.defined() || !lse.defined()) {
      const Tensor own_out = scratch<float>({batch(), heads(), seq_q(), dim_v()});
      const Tensor own_lse = scratch<float>({batch(), heads(), seq_q()});
      attend_normalized(own_out, own_lse);
      if (!out.defined()) out = own_out;
      if (!lse.defined()) lse = own_lse;
    }
    const Tensor dsum = scratch<float>({batch(), heads(), seq_q(), dim_v()});
    if (run_) l2_normalize_bwd(queue_, dout, out, lse, dsum);
    return dsum;
  }

  void attend_bwd(ConstTensor dsum, Tensor dv) {
    step([&] { return bucket_attention_bwd_workspace_bytes(queue_, dsum, codes_q_, codes_k_, bucket_options(), dv); },
         [&](Workspace w) { bucket_attention_bwd(queue_, dsum, codes_q_, codes_k_, bucket_options(), dv, w); });
  }

  void sampled_gradient(ConstTensor dsum, YosoGradient gradient, Tensor dq, Tensor dk) {
    BucketGradientOptions options;
    options.hash_bits = o_.hash_bits;
    options.rule = gradient == YosoGradient::sampled_exact ? GradientRule::exact : GradientRule::lower_bound;
    options.seed = o_.seed;
    options.is_causal = o_.is_causal;
    options.key_mask = o_.key_mask;
    options.query_mask = o_.query_mask;
    step([&] { return bucket_gradient_workspace_bytes(queue_, dsum, q_, k_, v_, codes_q_, codes_k_, options, dq, dk); },
         [&](Workspace w) { bucket_gradient(queue_, dsum, q_, k_, v_, codes_q_, codes_k_, options, dq, dk, w); });
  }

  void dense_gradient(ConstTensor dsum, YosoGradient gradient, Tensor dq, Tensor dk, Tensor dv) {
    const GradientRule rule = gradient == YosoGradient::exact ? GradientRule::exact : GradientRule::lower_bound;
    const CollisionAttentionOptions options = collision_options();
    step([&] { return collision_attention_bwd_workspace_bytes(queue_, dsum, q_, k_, v_, options, rule, dq, dk, dv); },
         [&](Workspace w) { collision_attention_bwd(queue_, dsum, q_, k_, v_, options, rule, dq, dk, dv, w); });
  }

  YosoOptions o_;
  Tensor codes_q_, codes_k_;
};

}  // namespace

int64_t yoso_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                       const YosoOptions& options, Tensor out, Tensor lse) {
  Yoso yoso(kOp, queue, q, k, v, options, nullptr);
  yoso.forward(out, lse);
  return yoso.bytes();
}

void yoso_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const YosoOptions& options,
                    Tensor out, Tensor lse, Workspace workspace) {
  core::check_workspace(kOp, workspace, yoso_attention_workspace_bytes(queue, q, k, v, options, out, lse));
  Yoso(kOp, queue, q, k, v, options, &workspace).forward(out, lse);
}

int64_t yoso_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                           ConstTensor v, const YosoOptions& options, ConstTensor out, ConstTensor lse,
                                           Tensor dq, Tensor dk, Tensor dv) {
  Yoso yoso(kOpBwd, queue, q, k, v, options, nullptr);
  yoso.backward(dout, out, lse, dq, dk, dv);
  return yoso.bytes();
}

void yoso_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                        const YosoOptions& options, ConstTensor out, ConstTensor lse, Tensor dq, Tensor dk, Tensor dv,
                        Workspace workspace) {
  core::check_workspace(kOpBwd, workspace,
                        yoso_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, out, lse, dq, dk, dv));
  Yoso(kOpBwd, queue, q, k, v, options, &workspace).backward(dout, out, lse, dq, dk, dv);
}

}  // namespace subquad
