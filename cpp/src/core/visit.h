/// Values to types, once, at the entry of a kernel.
#pragma once
#include <cstdint>

#include "subquad/dtype.h"

namespace subquad {

/// Calls f(T{}) with T = float, half or bfloat16. Any other dtype is a bug of the caller and does nothing.
template <class F>
static inline void visit_float(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::f16) f(half{});
  if (dtype == DType::bf16) f(bfloat16{});
}

template <int64_t V>
struct Constant {
  static constexpr int64_t value = V;
};

/// Calls f(Constant<V>{}) for the V of the list that equals `value`, or f(Constant<0>{}) when there is none.
template <int64_t... V, class F>
static inline void visit_int(int64_t value, F&& f) {
  const bool found = ((value == V ? (f(Constant<V>{}), true) : false) || ...);
  if (!found) f(Constant<0>{});
}

}  // namespace subquad
