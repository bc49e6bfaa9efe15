/// What the methods share: q, k and v with the checks of all that has their shapes, scratch arrays, and operators that
/// run behind them.
#pragma once
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>

#include "core/check.h"
#include "subquad/softmax_attention.h"

namespace subquad {

/// One call of a method. Without a workspace it lays out the scratch without touching it, from a made-up base address,
/// which is how the number of bytes is found.
class Composition {
 public:
  /// Bytes that the scratch arrays and the largest operator need; after the steps.
  int64_t bytes() const { return with_alignment(arena_) + nested_; }

 protected:
  /// Arrays that the results must not overlap.
  using Inputs = std::initializer_list<const ConstTensor*>;

  /// A gradient, and the array that it belongs to.
  struct Gradient {
    const char* name;
    const Tensor& array;
    const ConstTensor& like;
  };

  Composition(const char* op, const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
              const Workspace* workspace)
      : op_(op), queue_(queue), q_(q), k_(k), v_(v), run_(workspace != nullptr) {
    check_qkv();
    arena_ = run_ ? arena_at(workspace->data) : Arena{reinterpret_cast<char*>(uintptr_t(1) << 12), 0};
  }

  int64_t batch() const { return q_.shape[0]; }
  int64_t heads() const { return q_.shape[1]; }
  int64_t heads_kv() const { return k_.shape[1]; }
  int64_t seq_q() const { return q_.shape[2]; }
  int64_t seq_k() const { return k_.shape[2]; }
  int64_t dim() const { return q_.shape[3]; }
  int64_t dim_v() const { return v_.shape[3]; }

  template <class T>
  Tensor scratch(std::initializer_list<int64_t> shape) {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    return make_tensor(take<T>(arena_, count), shape, queue_.device);
  }

  /// Runs one operator behind the scratch arrays, or only notes how much scratch it needs itself.
  template <class Bytes, class Run>
  void step(Bytes&& workspace_bytes, Run&& run) {
    int64_t bytes = 0;
    named([&] { bytes = workspace_bytes(); });
    nested_ = std::max(nested_, bytes);
    if (run_) named([&] { run(Workspace{arena_.base + arena_.used, bytes}); });
  }

  /// Runs an operator that needs no scratch.
  template <class Run>
  void step(Run&& run) {
    if (run_) named(run);
  }

  /// One softmax attention of the composition.
  void softmax(ConstTensor q, ConstTensor k, ConstTensor v, const SoftmaxAttentionOptions& options, Tensor out,
               Tensor lse) {
    step([&] { return softmax_attention_workspace_bytes(queue_, q, k, v, options, out, lse); },
         [&](Workspace w) { softmax_attention(queue_, q, k, v, options, out, lse, w); });
  }

  void softmax_bwd(ConstTensor dout, ConstTensor dlse, ConstTensor q, ConstTensor k, ConstTensor v,
                   const SoftmaxAttentionOptions& options, ConstTensor out, ConstTensor lse,
                   const SoftmaxAttentionGradients& g) {
    step([&] { return softmax_attention_bwd_workspace_bytes(queue_, dout, dlse, q, k, v, options, out, lse, g); },
         [&](Workspace w) { softmax_attention_bwd(queue_, dout, dlse, q, k, v, options, out, lse, g, w); });
  }

  /// Checks a mask [B, tokens] if it is given.
  void check_mask(const char* name, const ConstTensor& mask, const char* letter, int64_t tokens) const {
    if (mask.defined())
      core::check_array(op_, name, queue_, mask, {{"B", batch()}, {letter, tokens}}, {DType::boolean});
  }

  /// Checks an array like the result, [B, H, N, E].
  void check_rows(const char* name, const ConstTensor& t) const {
    core::check_array(op_, name, queue_, t, {{"B", batch()}, {"H", heads()}, {"N", seq_q()}, {"E", dim_v()}},
                      {q_.dtype});
  }

  /// Checks a log-sum-exp [B, H, N].
  void check_lse(const ConstTensor& lse) const {
    core::check_array(op_, "lse", queue_, lse, {{"B", batch()}, {"H", heads()}, {"N", seq_q()}}, {DType::f32});
  }

  /// Checks the results of a forward pass; lse may be missing.
  void check_results(const Tensor& out, const Tensor& lse, Inputs inputs) const {
    check_rows("out", out);
    if (lse.defined()) check_lse(lse);
    check_apart("out", out, inputs);
    check_apart("lse", lse, inputs);
    core::check_output(op_, "out", out, {&lse});
  }

  /// Checks the arrays of a backward pass; out and lse may be missing, and gradients of arrays that are not there are.
  void check_gradients(const ConstTensor& dout, const ConstTensor& out, const ConstTensor& lse,
                       std::initializer_list<Gradient> gradients, Inputs inputs) const {
    check_rows("dout", dout);
    if (out.defined()) check_rows("out", out);
    if (lse.defined()) check_lse(lse);
    for (const Gradient& g : gradients) {
      if (!g.like.defined() && !g.array.defined()) continue;
      if (!g.like.defined()) core::invalid(op_, g.name, "none without the array that it belongs to", "an array");
      core::check_array(
          op_, g.name, queue_, g.array,
          {{"B", g.like.shape[0]}, {"H", g.like.shape[1]}, {"N", g.like.shape[2]}, {"D", g.like.shape[3]}},
          {g.like.dtype});
      check_apart(g.name, g.array, inputs);
      core::check_output(op_, g.name, g.array, {&dout, &out, &lse});
      for (const Gradient* other = gradients.begin(); other != &g; ++other)
        core::check_output(op_, g.name, g.array, {&other->array});
    }
  }

  const char* op_;
  Queue queue_;
  ConstTensor q_, k_, v_;
  bool run_;
  Arena arena_ = {};

 private:
  /// Checks q [B, H, N, D], k [B, Hkv, M, D] and v [B, Hkv, M, E] of one dtype.
  void check_qkv() const {
    using core::kAny;
    const auto floats = {DType::f32, DType::f16, DType::bf16};
    core::check_array(op_, "q", queue_, q_, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
    core::check_array(op_, "k", queue_, k_, {{"B", batch()}, {"Hkv", kAny}, {"M", kAny}, {"D", dim()}}, {q_.dtype});
    core::check_array(op_, "v", queue_, v_, {{"B", batch()}, {"Hkv", heads_kv()}, {"M", seq_k()}, {"E", kAny}},
                      {q_.dtype});
    core::check_groups(op_, "k", heads(), heads_kv());
    if (dim() == 0) core::invalid(op_, "q", "a head dimension of at least 1", "0");
    if (dim_v() == 0) core::invalid(op_, "v", "a head dimension of at least 1", "0");
  }

  /// Checks that a result shares memory with none of the inputs.
  void check_apart(const char* name, const Tensor& result, Inputs inputs) const {
    core::check_output(op_, name, result, {&q_, &k_, &v_});
    core::check_output(op_, name, result, inputs);
  }

  /// Runs f; what an operator refuses there carries the name of this call, the only one that the user knows.
  template <class F>
  void named(F&& f) const {
    try {
      f();
    } catch (const TypeMismatch& error) {
      throw TypeMismatch(renamed(error));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(renamed(error));
    } catch (const Unsupported& error) {
      throw Unsupported(renamed(error));
    }
  }

  std::string renamed(const std::exception& error) const {
    const std::string text = error.what();
    // What concerns the whole library is not this call's.
    if (text.rfind("[cpu]", 0) == 0) return text;
    return "[" + std::string(op_) + text.substr(std::min(text.find(']'), text.size()));
  }

  int64_t nested_ = 0;
};

/// The softmax scale with its default, D^-1/2.
inline double scale_of(const char* op, double scale, int64_t dim) {
  if (scale == 0) return 1.0 / std::sqrt(double(dim));
  if (!(scale > 0) || std::isinf(scale)) core::invalid(op, "scale", "a finite number above 0", std::to_string(scale));
  return scale;
}

/// The view with axis `axis` of extent 1 put in.
inline ConstTensor with_axis(const ConstTensor& t, int axis) {
  ConstTensor wide = t;
  ++wide.rank;
  for (int i = t.rank; i > axis; --i) wide.shape[i] = t.shape[i - 1], wide.stride[i] = t.stride[i - 1];
  wide.shape[axis] = 1, wide.stride[axis] = axis < t.rank ? 0 : 1;
  return wide;
}

inline Tensor with_axis(const Tensor& t, int axis) {
  Tensor wide;
  static_cast<ConstTensor&>(wide) = with_axis(static_cast<const ConstTensor&>(t), axis);
  return wide;
}

/// The view with axis `axis`, of extent 1, repeated without memory of its own.
inline ConstTensor repeated(const ConstTensor& t, int axis, int64_t extent) {
  ConstTensor wide = t;
  if (wide.shape[axis] != extent) wide.shape[axis] = extent, wide.stride[axis] = 0;
  return wide;
}

/// The view of `count` entries of axis `axis` from `first` on.
template <class T>
T cut(const T& t, int axis, int64_t first, int64_t count) {
  T part = t;
  part.shape[axis] = count;
  part.data = static_cast<const char*>(t.data) + first * t.stride[axis] * dtype_bytes(t.dtype);
  return part;
}

}  // namespace subquad
