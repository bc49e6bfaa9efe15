/// Arrays for the operator tests: any float dtype, any layout, and their values in double.
#pragma once
#include <algorithm>
#include <random>

#include "check.h"
#include "subquad/tensor.h"

namespace check {

using namespace subquad;

enum class Layout {
  dense,
  loose,  ///< outer axes in the opposite order, a gap behind every row, the first axis backwards
};

/// `values` holds what the elements are after rounding; memory that no element owns is NaN.
struct Array {
  std::vector<double> values;
  std::vector<unsigned char> bytes;
  Tensor view;

  Array() = default;
  Array(std::initializer_list<int64_t> shape, DType dtype, Layout layout = Layout::dense) {
    for (int64_t extent : shape) view.shape[view.rank++] = extent;
    view.dtype = dtype;
    const int last = view.rank - 1;
    int64_t step = view.shape[last] + (layout == Layout::loose ? 3 : 0), first = 0;
    view.stride[last] = 1;
    for (int i = 0; i < last; ++i) {
      const int axis = layout == Layout::loose ? i : last - 1 - i;
      view.stride[axis] = step, step *= view.shape[axis];
    }
    if (layout == Layout::loose && last > 0 && view.shape[0] > 0) {
      first = (view.shape[0] - 1) * view.stride[0];
      view.stride[0] = -view.stride[0];
    }
    bytes.assign(size_t(step * dtype_bytes(dtype)) + 64, 0xff);
    view.data = bytes.data() + first * dtype_bytes(dtype);
    values.resize(size_t(view.numel()));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;

  int64_t size() const { return int64_t(values.size()); }

  int64_t at(int64_t i) const {
    int64_t offset = 0;
    for (int axis = view.rank - 1; axis >= 0; --axis)
      offset += i % view.shape[axis] * view.stride[axis], i /= view.shape[axis];
    return offset;
  }

  float get(int64_t i) const {
    if (view.dtype == DType::f32) return static_cast<const float*>(view.data)[at(i)];
    if (view.dtype == DType::f16) return to_float(static_cast<const half*>(view.data)[at(i)]);
    return to_float(static_cast<const bfloat16*>(view.data)[at(i)]);
  }

  void set(int64_t i, double x) {
    void* data = view.mutable_data();
    if (view.dtype == DType::f32) from_float(float(x), static_cast<float*>(data) + at(i));
    if (view.dtype == DType::f16) from_float(float(x), static_cast<half*>(data) + at(i));
    if (view.dtype == DType::bf16) from_float(float(x), static_cast<bfloat16*>(data) + at(i));
    values[size_t(i)] = get(i);
  }

  void fill_normal(std::mt19937& random, double scale = 1) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size(); ++i) set(i, scale * normal(random));
  }

  /// All elements as f32.
  std::vector<float> floats() const {
    std::vector<float> all;
    for (int64_t i = 0; i < size(); ++i) all.push_back(get(i));
    return all;
  }
};

static inline double epsilon(DType dtype) {
  return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
}

static inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

/// Element by element: the error against `exact` is at most twice that of `plain` (the same formula in float, its
/// largest error over the array) and one rounding of the result.
static inline void check_budget(const char* file, int line, const std::string& what, const Array& got,
                                const std::vector<double>& exact, const std::vector<double>& plain) {
  double granted = 0;
  for (size_t i = 0; i < exact.size(); ++i)
    if (std::isfinite(exact[i])) granted = std::fmax(granted, std::fabs(plain[i] - exact[i]));
  const double tiny = got.view.dtype == DType::f16 ? 0x1p-24 : 0x1p-126;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double value = got.get(int64_t(i)), error = std::fabs(value - exact[i]);
    const double budget = 2 * granted + epsilon(got.view.dtype) * std::fabs(exact[i]) + tiny;
    if (value == exact[i] || error <= budget) continue;
    char text[160];
    std::snprintf(text, sizeof text, ": element %d is %.9g against %.9g, error %.3g above %.3g", int(i), value,
                  exact[i], error, budget);
    return fail(file, line, what + text);
  }
}

}  // namespace check

#define CHECK_BUDGET(what, got, exact, plain) check::check_budget(__FILE__, __LINE__, what, got, exact, plain)
