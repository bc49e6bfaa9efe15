#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "core/registry.h"
#include "device/launch.cuh"
#include "subquad/cuda.h"
#include "table.h"

namespace subquad {
namespace cuda {
namespace {

const char* words_of(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

const char* enter(int32_t index, int32_t* before) {
  int current = 0;
  if (const char* status = words_of(cudaGetDevice(&current))) return status;
  *before = current;
  return current == index ? nullptr : words_of(cudaSetDevice(index));
}

void leave(int32_t before) {
  int current = before;
  cudaGetDevice(&current);
  if (current != before) cudaSetDevice(before);
}

const char* read(const Queue& queue, void* host, const void* device, int64_t bytes) {
  const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
  if (const char* status = words_of(cudaMemcpyAsync(host, device, size_t(bytes), cudaMemcpyDeviceToHost, stream)))
    return status;
  return words_of(cudaStreamSynchronize(stream));
}

constexpr core::DeviceBackend kBackend = {table, enter, leave, read};

}  // namespace

bool synchronises() {
  static const bool value = [] {
    const char* text = std::getenv("SUBQUAD_SYNC");
    return text && !std::strcmp(text, "1");
  }();
  return value;
}

int64_t most_shared_bytes(const Queue& queue) {
  int value = 0;
  cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device.index);
  return value;
}

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> all;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) cudaGetLastError(), count = 0;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    all.push_back({p.name, p.major, p.minor, p.multiProcessorCount, int64_t(p.totalGlobalMem)});
  }
  return all;
}

std::string why_none() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count ? "" : "the driver shows no device";
}

std::string runtime_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string architectures() { return SUBQUAD_ARCHITECTURES; }

}  // namespace cuda

void register_cuda() { core::register_cuda_backend(cuda::kBackend); }

}  // namespace subquad
