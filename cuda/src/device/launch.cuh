/// How host code starts a kernel, and what every kernel's host part says.
#pragma once
#include "device/arithmetic.cuh"
#include "device/language.cuh"
#include "subquad/queue.h"

namespace subquad::cuda {

/// Widest rows that the CUDA kernels take, and what they say of wider ones.
static constexpr int64_t kMaxHeadDim = 256;
static constexpr const char* kTooWide = "a head dimension above 256";

/// Tokens are counted in 32 bits; what is said of more of them.
static constexpr const char* kTooManyTokens = "more than 2^31 - 1 tokens";

/// True if SUBQUAD_SYNC=1: every launch waits, so that a failure is reported by the operator that caused it.
bool synchronises();

/// Shared memory that a block can have on the queue's device; kernels that can do with less look here.
#if defined(__CUDACC__)
int64_t most_shared_bytes(const Queue& queue);
#else
inline int64_t most_shared_bytes(const Queue&) { return 227 * 1024; }
#endif

/// Starts a kernel on the queue's stream. Null, or what the device said.
template <class... P, class... A>
const char* launch(const Queue& queue, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   const A&... args) {
#if defined(__CUDACC__)
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status != cudaSuccess) cudaGetLastError();
    if (status == cudaErrorInvalidValue) return "the device has less shared memory for a block than the kernel needs";
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  // Its own status: the last error may be one that the caller has left behind.
  cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  if (status == cudaSuccess && synchronises()) status = cudaStreamSynchronize(config.stream);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
#else
  (void)queue;
  return ::emulator::launch(kernel, grid, block, shared_bytes, args...);
#endif
}

}  // namespace subquad::cuda
