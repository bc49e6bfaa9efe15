/// Element types and the 16-bit storage formats.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SUBQUAD_HD __host__ __device__
#else
#define SUBQUAD_HD
#endif

namespace subquad {

/// Element type of an array. `none` marks an argument that was not given.
enum class DType : uint8_t { none, f32, f16, bf16, i64, i32, u16, u8, boolean };

/// Size of one element in bytes; 0 for `none`.
static constexpr int64_t dtype_bytes(DType t) {
  return t == DType::none                                         ? 0
         : t == DType::i64                                        ? 8
         : t == DType::f32 || t == DType::i32                     ? 4
         : t == DType::f16 || t == DType::bf16 || t == DType::u16 ? 2
                                                                  : 1;
}

static constexpr bool is_float(DType t) { return t == DType::f32 || t == DType::f16 || t == DType::bf16; }

// On a CUDA device the conversions are single instructions, with the same results.

/// IEEE binary16 as stored; arithmetic happens in float.
struct half {
  uint16_t bits;
};

/// bfloat16 (the upper half of a binary32) as stored; arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;
};

// `static`, not `inline`: a row of kernels compiled for AVX-512 must not donate its copy to the whole program.
static SUBQUAD_HD inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static SUBQUAD_HD inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static SUBQUAD_HD inline float to_float(float x) { return x; }

static SUBQUAD_HD inline float to_float(bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

/// Exact for every input: subnormals are scaled by a power of two, infinities and NaN keep their class.
static SUBQUAD_HD inline float to_float(half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float value = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);  // * 2^112
  return bits_to_float(float_to_bits(value) | sign);
#endif
}

static SUBQUAD_HD inline void from_float(float x, float* y) { *y = x; }

/// Round to nearest even; NaN stays a quiet NaN.
static SUBQUAD_HD inline void from_float(float x, bfloat16* y) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y->bits) : "f"(x));
#else
  const uint32_t u = float_to_bits(x);
  y->bits =
      (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(u >> 16 | 0x40u) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
}

/// Round to nearest even; overflow becomes infinity, NaN stays a quiet NaN.
static SUBQUAD_HD inline void from_float(float x, half* y) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y->bits) : "f"(x));
#else
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    y->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above, infinity included
    y->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the float adder round at the subnormal step
    y->bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    y->bits = uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
  }
#endif
}

}  // namespace subquad
