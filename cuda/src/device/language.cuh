/// The CUDA language: nvcc's own, or under a host compiler the emulator's.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulator/cuda.h"
#endif

namespace subquad::cuda {

/// The dynamic shared memory of the block, aligned to 1024 bytes.
template <class T>
__device__ inline T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
#else
  return reinterpret_cast<T*>(::emulator::dyn_smem());
#endif
}

}  // namespace subquad::cuda
