/// Random arrays from counters. A thread makes the four numbers of one counter, in the CPU's operations one by one, so
/// that the bits are the CPU's. Neighbouring threads write neighbouring 16 bytes.
/// Bytes: one write of the array. A counter costs about 75 instructions (normals 150 more) besides those of its place,
/// and 16 bytes pass in the time of 98: uniforms and signs are about bound by memory, normals run at a third of it.
#pragma once
#include "core/philox.h"
#include "device/arithmetic.cuh"
#include "exact_float.cuh"
#include "ops/random_args.h"

namespace subquad::cuda {

static constexpr int kRandomThreads = 256;
static constexpr int kRandomColumns = 4;  // of a counter

/// ln((w + 1) 2^-32) to about one unit in the last place, also where it is close to zero.
__device__ inline ExactFloat log_of_word(uint32_t w) {
  // From sqrt(1/2) on the number is 1 - y 2^-32, below that it is y 2^-32; y = high + low, both exact as floats.
  const bool near_one = w >= 0xb504f333u;
  const uint32_t y = near_one ? ~w : w + 1u, low_bits = y >= 0x01000000u ? y & 0xffu : 0u;
  const ExactFloat high(float(y - low_bits)), low((float(low_bits)));
  // high 2^-32 or 1 - high 2^-32 as (1 + f) 2^e with 1 + f in [sqrt(1/2), sqrt(2)); f is exact.
  const uint32_t bits = float_to_bits(high.value) - 0x3f3504f3u;
  const ExactFloat mantissa(bits_to_float((bits & 0x007fffffu) + 0x3f3504f3u));
  const ExactFloat f = near_one ? -0x1p-32f * high : mantissa + -1.0f;
  const ExactFloat e(near_one ? 0.0f : float(int32_t(bits >> 23) - 32));
  const ExactFloat rest = (near_one ? -0x1p-32f * low : low) / (near_one ? f + 1.0f : high);
  // log(1 + f) = f - f^2 / 2 + f^3 p(f) with p minimax; ln 2 in two parts, the first exact times e.
  ExactFloat p(-0.0763442963f);
  p = p * f + 0.127615497f;
  p = p * f + -0.131601945f;
  p = p * f + 0.142017618f;
  p = p * f + -0.166233569f;
  p = p * f + 0.200012267f;
  p = p * f + -0.250008225f;
  p = p * f + 0.333333313f;
  const ExactFloat square = f * f;
  const ExactFloat small = square * f * p + (rest + -2.12194440e-4f * e) - 0.5f * square;
  return (small + f) + 0.693359375f * e;
}

/// (cos, sin) of 2 pi w 2^-32.
__device__ inline float2 cos_sin_of_word(uint32_t w) {
  // The quadrant and the signed distance from its middle axis are exact in integers. The leading product is exact too:
  // 12 bits of the distance times 12 bits of 2 pi 2^-32.
  const uint32_t quadrant = (w + 0x20000000u) >> 30, distance = w - (quadrant << 30);
  const ExactFloat high(float(int32_t(distance & 0xfffe0000u))), low(float(int32_t(distance & 0x0001ffffu)));
  const ExactFloat leading = 0x1.92p-30f * high, rest = 0x1.fb5444p-42f * high + 0x1.921fb6p-30f * low;
  const ExactFloat x = leading + rest, square = x * x;
  ExactFloat s(-1.95172979e-4f), c(2.44384501e-5f);
  s = s * square + 8.33217800e-3f, c = c * square + -1.38873677e-3f;
  s = s * square + -0.166666552f, c = c * square + 4.16666456e-2f;
  const ExactFloat sine = leading + (rest + s * square * x);
  const ExactFloat cosine = 1.0f - (0.5f * square - c * square * square);
  const bool swapped = quadrant & 1u;
  const uint32_t negative_cos = (quadrant + 1u) >> 1 << 31, negative_sin = quadrant >> 1 << 31;
  return {bits_to_float(float_to_bits(swapped ? sine.value : cosine.value) ^ negative_cos),
          bits_to_float(float_to_bits(swapped ? cosine.value : sine.value) ^ negative_sin)};
}

template <Distribution kDistribution>
__device__ inline float4 numbers_of(const philox::Words& words) {
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    x[i] = kDistribution == Distribution::uniform ? float(words.w[i] >> 8) * 0x1p-24f
                                                  : bits_to_float((words.w[i] & 0x80000000u) | 0x3f800000u);
  if constexpr (kDistribution == Distribution::normal) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const ExactFloat radius(sqrtf((-2.0f * log_of_word(words.w[i])).value));
      const float2 direction = cos_sin_of_word(words.w[i + 1]);
      x[i] = (direction.x * radius).value, x[i + 1] = (direction.y * radius).value;
    }
  }
  return make_float4(x[0], x[1], x[2], x[3]);
}

template <Distribution kDistribution>
__global__ void __launch_bounds__(kRandomThreads) random_kernel(const __grid_constant__ RandomArgs args) {
  const int64_t counters_a_row = ceil_div(args.cols, kRandomColumns);
  const int64_t count = args.leading * args.rows * counters_a_row;
  const uint64_t seed = args.seed_ptr ? uint64_t(*args.seed_ptr) : args.seed;
  const int64_t step = int64_t(gridDim.x) * kRandomThreads;
  for (int64_t i = int64_t(blockIdx.x) * kRandomThreads + threadIdx.x; i < count; i += step) {
    const Quotient row = divide(i, counters_a_row), matrix = divide(row.whole, args.rows);
    const int64_t quad = row.rest, n = matrix.rest, l = matrix.whole;
    const float4 x =
        numbers_of<kDistribution>(philox::words(seed, uint32_t(n), uint32_t(quad), uint32_t(l), args.stream));
    float* out =
        static_cast<float*>(args.out.data) + l * args.out.stride[0] + n * args.out.stride[1] + kRandomColumns * quad;
    const int64_t left = args.cols - kRandomColumns * quad;
    if (left >= 4 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
      *reinterpret_cast<float4*>(out) = x;
    } else {
      out[0] = x.x;
      if (left > 1) out[1] = x.y;
      if (left > 2) out[2] = x.z;
      if (left > 3) out[3] = x.w;
    }
  }
}

}  // namespace subquad::cuda
