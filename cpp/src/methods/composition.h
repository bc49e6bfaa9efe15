/// What the methods share: scratch arrays, operators that run behind them, and the checks of q, k and v.
#pragma once
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>

#include "core/check.h"
#include "subquad/tensor.h"

namespace subquad {

/// One call of a method. Without a workspace it lays out the scratch without touching it, from a made-up base address,
/// which is how the number of bytes is found.
class Composition {
 public:
  /// Bytes that the scratch arrays and the largest operator need; after the steps.
  int64_t bytes() const { return with_alignment(arena_) + nested_; }

 protected:
  Composition(const char* op, const Queue& queue, const Workspace* workspace)
      : op_(op), queue_(queue), run_(workspace != nullptr) {
    arena_ = run_ ? arena_at(workspace->data) : Arena{reinterpret_cast<char*>(uintptr_t(1) << 12), 0};
  }

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

  /// Checks q [B, H, N, D], k [B, Hkv, M, D] and v [B, Hkv, M, E] of one dtype.
  void check_qkv(const ConstTensor& q, const ConstTensor& k, const ConstTensor& v) const {
    using core::kAny;
    const auto floats = {DType::f32, DType::f16, DType::bf16};
    core::check_array(op_, "q", queue_, q, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}}, floats);
    core::check_array(op_, "k", queue_, k, {{"B", q.shape[0]}, {"Hkv", kAny}, {"M", kAny}, {"D", q.shape[3]}},
                      {q.dtype});
    core::check_array(op_, "v", queue_, v, {{"B", q.shape[0]}, {"Hkv", k.shape[1]}, {"M", k.shape[2]}, {"E", kAny}},
                      {q.dtype});
    core::check_groups(op_, "k", q.shape[1], k.shape[1]);
    if (q.shape[3] == 0) core::invalid(op_, "q", "a head dimension of at least 1", "0");
    if (v.shape[3] == 0) core::invalid(op_, "v", "a head dimension of at least 1", "0");
  }

  /// Checks a mask [B, tokens] if it is given.
  void check_mask(const char* name, const ConstTensor& mask, int64_t batch, const char* letter, int64_t tokens) const {
    if (mask.defined()) core::check_array(op_, name, queue_, mask, {{"B", batch}, {letter, tokens}}, {DType::boolean});
  }

  /// Checks an array [B, H, N, D] of the given letters, extents taken from `like`.
  void check_like(const char* name, const ConstTensor& t, const ConstTensor& like,
                  const char* const (&letters)[4]) const {
    core::check_array(op_, name, queue_, t,
                      {{letters[0], like.shape[0]},
                       {letters[1], like.shape[1]},
                       {letters[2], like.shape[2]},
                       {letters[3], like.shape[3]}},
                      {like.dtype});
  }

  const char* op_;
  Queue queue_;
  bool run_;
  Arena arena_ = {};

 private:
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
