/// Copies from global to shared memory that go on while the warp computes (cp.async).
#pragma once
#include "device/language.cuh"
#if !defined(__CUDACC__)
#include "emulator/async_copy.h"
#endif

namespace subquad::cuda {

/// Begins to copy `bytes` (0 to 16) and fills the rest of 16 bytes with zeros. Both addresses are 16-byte aligned; with
/// 0 bytes the source is not read.
__device__ inline void copy_async16(void* shared, const void* global, int bytes = 16) {
#if defined(__CUDACC__)
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  ::emulator::copy_async16(shared, global, bytes);
#endif
}

/// Makes the copies begun since the last commit a group.
__device__ inline void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::emulator::copy_async_commit();
#endif
}

/// Waits until at most the N newest groups of this thread are under way; other threads' copies need a barrier besides.
template <int N>
__device__ inline void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  ::emulator::copy_async_wait(N);
#endif
}

}  // namespace subquad::cuda
