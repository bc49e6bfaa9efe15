// Prints the float32 operations per second of independent multiply-adds on argv[1] threads.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4)));

constexpr int kChains = 12;  // enough to hide the latency of two units
constexpr long kRounds = 20000000;

static void burn(float* sink) {
  Vector sum[kChains], factor = Vector{} + 0.999999f, term = Vector{} + 1e-6f;
  for (int i = 0; i < kChains; ++i) sum[i] = Vector{} + float(i);
  for (long round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
  }
  for (int i = 1; i < kChains; ++i) sum[0] += sum[i];
  *sink = sum[0][0];
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::vector<float> sinks(threads * 64);
  std::vector<std::thread> team;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t) team.emplace_back(burn, &sinks[t * 64]);
  for (std::thread& member : team) member.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%.6g\n", 2.0 * kLanes * kChains * kRounds * threads / seconds);
}
