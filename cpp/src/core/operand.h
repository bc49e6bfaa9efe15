/// What kernels see of an array, and how they cut up their scratch memory. Plain data, no checks.
#pragma once
#include <cstddef>
#include <cstdint>

#include "subquad/dtype.h"
#include "subquad/queue.h"

namespace subquad {

/// Widest rows of queries, keys and values that the CPU kernels take, and what they say of wider ones.
static constexpr int64_t kMaxHeadDim = 512;
static constexpr const char* kTooWide = "a head dimension above 512";

/// An array of up to four axes whose last axis is contiguous. A null `data` of a non-empty axis product means "not
/// given". Axes are those of the operator's header, aligned at the front: stride[0] is the first axis. Strides are in
/// elements and may be zero or negative.
struct Operand {
  void* data;
  int64_t stride[4];
  DType dtype;
};

/// The address of the first element of x[i, j, k].
template <class T>
static SUBQUAD_HD inline T* element(const Operand& x, int64_t i = 0, int64_t j = 0, int64_t k = 0) {
  return static_cast<T*>(x.data) + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}

/// Element type, 64-byte aligned pieces of one block of scratch memory. With a null base it only measures, so that one
/// function lays out the scratch of an operator both for `workspace_bytes` and for `run`.
struct Arena {
  char* base;
  int64_t used;
};

static inline Arena arena_at(void* workspace) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return {reinterpret_cast<char*>((address + 63) & ~uintptr_t(63)), 0};
}

template <class T>
static inline T* take(Arena& arena, int64_t count) {
  T* piece = arena.base ? reinterpret_cast<T*>(arena.base + arena.used) : nullptr;
  arena.used += (count * int64_t(sizeof(T)) + 63) & ~int64_t(63);
  return piece;
}

/// Bytes to ask for so that `used` bytes fit behind any base address.
static inline int64_t with_alignment(const Arena& arena) { return arena.used ? arena.used + 64 : 0; }

}  // namespace subquad
