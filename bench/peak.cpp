// Prints the float32 operations per second of independent multiply-adds on argv[1] threads, then the exponentials.
#include <chrono>
#include <cstdint>
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
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

constexpr int kChains = 12;  // enough to hide the latency of two units
constexpr long kRounds = 20000000;
constexpr int kExpChains = 8;
constexpr long kExpRounds = 2000000;

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

static Vector exponential(Vector x) {
  const Vector magic = Vector{} + 12582912.0f, k = x * 1.44269504f + magic;
  const Vector r = x - (k - magic) * 0.693147181f;
  Vector p = r * 0.0013843607f + 0.0083741955f;
  p = p * r + 0.041668005f;
  p = p * r + 0.1666643f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (Vector)((Integers)p + ((Integers)k << 23));
}

static void burn_exp(float* sink) {
  Vector x[kExpChains];
  for (int i = 0; i < kExpChains; ++i) x[i] = Vector{} - 0.1f * float(i);
  for (long round = 0; round < kExpRounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kExpChains; ++i) x[i] = -exponential(x[i]);
  }
  for (int i = 1; i < kExpChains; ++i) x[0] += x[i];
  *sink = x[0][0];
}

static double seconds(int threads, void (*work)(float*)) {
  std::vector<float> sinks(threads * 64);
  std::vector<std::thread> team;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t) team.emplace_back(work, &sinks[t * 64]);
  for (std::thread& member : team) member.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("%.6g\n", 2.0 * kLanes * kChains * kRounds * threads / seconds(threads, burn));
  std::printf("%.6g\n", 1.0 * kLanes * kExpChains * kExpRounds * threads / seconds(threads, burn_exp));
}
