/// Views of arrays that somebody else owns.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "subquad/dtype.h"
#include "subquad/queue.h"

namespace subquad {

inline constexpr int kMaxRank = 6;

/// A read-only view: pointer, shape, strides (in elements), dtype, device. A default-constructed view means "not
/// given".
struct ConstTensor {
  const void* data = nullptr;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};
  int32_t rank = 0;
  DType dtype = DType::none;
  Device device = {DeviceType::cpu, 0};

  bool defined() const { return dtype != DType::none; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

/// A view that may be written through.
struct Tensor : ConstTensor {
  void* mutable_data() const { return const_cast<void*>(data); }
};

/// Scratch memory for one call; ask the operator's `_workspace_bytes` for the size. Any alignment.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;
};

template <class T>
constexpr DType dtype_of() {
  using U = std::remove_const_t<T>;
  if constexpr (std::is_same_v<U, float>)
    return DType::f32;
  else if constexpr (std::is_same_v<U, half>)
    return DType::f16;
  else if constexpr (std::is_same_v<U, bfloat16>)
    return DType::bf16;
  else if constexpr (std::is_same_v<U, int64_t>)
    return DType::i64;
  else if constexpr (std::is_same_v<U, int32_t>)
    return DType::i32;
  else if constexpr (std::is_same_v<U, uint16_t>)
    return DType::u16;
  else if constexpr (std::is_same_v<U, bool>)
    return DType::boolean;
  else
    return DType::u8;
}

/// A contiguous row-major view of `data` on the CPU or on `device`.
template <class T>
auto make_tensor(T* data, std::initializer_list<int64_t> shape, Device device = {DeviceType::cpu, 0}) {
  std::conditional_t<std::is_const_v<T>, ConstTensor, Tensor> t;
  t.data = data;
  t.dtype = dtype_of<T>();
  t.device = device;
  for (int64_t extent : shape) t.shape[t.rank++] = extent;
  int64_t step = 1;
  for (int i = t.rank - 1; i >= 0; --i) t.stride[i] = step, step *= t.shape[i];
  return t;
}

}  // namespace subquad
