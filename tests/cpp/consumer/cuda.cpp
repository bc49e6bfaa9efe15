// A C++ program on a CUDA device: memory and stream of its own, one call, the same call as a captured graph.
// Exit status 77 without a device.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "subquad/subquad.h"

namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(status));
  std::exit(1);
}

template <class T>
T* device_memory(size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)));
  return static_cast<T*>(memory);
}

}  // namespace

int main() {
  subquad::register_cuda();
  if (subquad::cuda::devices().empty()) {
    std::printf("no device: %s\n", subquad::cuda::why_none().c_str());
    return 77;
  }
  const int64_t heads = 2, seq = 300, dim = 64;
  const size_t count = size_t(heads * seq * dim);
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  const subquad::Queue queue = subquad::Queue::cuda(0, stream);
  float *q = device_memory<float>(count), *out = device_memory<float>(count);
  const auto x = subquad::make_tensor(q, {1, heads, seq, dim}, queue.device);
  const auto y = subquad::make_tensor(out, {1, heads, seq, dim}, queue.device);
  subquad::random_normal(queue, 1, 16, x);

  subquad::YosoOptions options;
  const int64_t bytes = subquad::yoso_attention_workspace_bytes(queue, x, x, x, options, y, {});
  const subquad::Workspace workspace = {device_memory<char>(size_t(bytes)), bytes};
  std::vector<float> eager(count), replayed(count);
  subquad::yoso_attention(queue, x, x, x, options, y, {}, workspace);
  check(cudaMemcpyAsync(eager.data(), out, count * sizeof(float), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  subquad::yoso_attention(queue, x, x, x, options, y, {}, workspace);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  check(cudaMemsetAsync(out, 0xff, count * sizeof(float), stream));
  check(cudaGraphLaunch(executable, stream));
  check(cudaMemcpyAsync(replayed.data(), out, count * sizeof(float), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));

  double checksum = 0;
  for (int64_t row = 0; row < heads * seq; ++row) {
    double square = 0;
    for (int64_t i = 0; i < dim; ++i) square += std::pow(double(eager[size_t(row * dim + i)]), 2);
    checksum += std::sqrt(square);
  }
  const bool same = !std::memcmp(eager.data(), replayed.data(), count * sizeof(float));
  std::printf("checksum %.3f, graph %s\n", checksum, same ? "equal" : "different");
  return same && std::fabs(checksum - double(heads * seq)) < 1 ? 0 : 1;
}
