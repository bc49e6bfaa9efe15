/// The vocabulary of the CPU kernels: vectors of kLanes floats, the same words on every row.
///
/// GCC and clang vector extensions carry the arithmetic; intrinsics appear only where a row has an instruction that the
/// extensions cannot name. Everything here is static: an inline function compiled for AVX-512 must never become the
/// copy that the linker keeps for the whole program.
#pragma once
#include <cstdint>
#include <cstring>

#include "subquad/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace subquad::cpu::SUBQUAD_ISA {

template <int... L>
struct Lanes {};

#if defined(__AVX512F__)
static constexpr int kLanes = 16;
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
static constexpr int kLanes = 8;
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
static constexpr int kLanes = 4;
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef float LooseF32 __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t LooseI32 __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t LooseU16 __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// x - 0 is x for every x (0 + x is not, for -0), so compilers fold it into a plain broadcast.
static inline F32 set(float x) { return x - F32{}; }
static inline I32 set(int32_t x) { return I32{} + x; }
static inline U32 set(uint32_t x) { return U32{} + x; }

static inline I32 lane_index() {
  I32 index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

/// Lanes below `count`.
static inline I32 lanes_below(int64_t count) { return lane_index() < int32_t(count); }

static inline F32 as_f32(I32 x) { return (F32)x; }
static inline F32 as_f32(U32 x) { return (F32)x; }
static inline I32 as_i32(F32 x) { return (I32)x; }
static inline U32 as_u32(F32 x) { return (U32)x; }

/// Lanes of `a` where the mask (all ones or all zeros, as comparisons give) is set, else lanes of `b`.
static inline F32 select(I32 mask, F32 a, F32 b) { return mask ? a : b; }
static inline I32 select(I32 mask, I32 a, I32 b) { return mask ? a : b; }

static inline F32 load(const float* p) { return *(const LooseF32*)p; }
static inline I32 load(const int32_t* p) { return *(const LooseI32*)p; }
static inline void store(float* p, F32 x) { *(LooseF32*)p = x; }
static inline void store(int32_t* p, I32 x) { *(LooseI32*)p = x; }

/// a * b + c with one rounding where the row has the instruction (the floor row has two roundings).
static inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

/// Lane-wise; if either lane is NaN the result is the lane of `b`, as the instructions have it (compilers make a
/// compare and a blend of the expression).
static inline F32 min(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F32)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

static inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F32)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

static inline F32 abs(F32 x) { return as_f32(as_u32(x) & set(0x7fffffffu)); }

static inline F32 sqrt(F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (F32)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (F32)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (F32)vsqrtq_f32((float32x4_t)x);
#endif
}

static inline float sqrt(float x) { return sqrt(set(x))[0]; }

/// Sum of the lanes, as a balanced tree: the order is the row's own.
static inline float reduce_add(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lane[kLanes];
  store(lane, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}

static inline float reduce_max(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

/// Whether any lane of a mask, as comparisons give, is set.
static inline bool any(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#endif
}

// 16-bit storage

static inline F32 load(const bfloat16* p) {
#if defined(__AVX512F__)
  return as_f32((U32)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return as_f32((U32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  const LooseU16 bits = *(const LooseU16*)p;
  return as_f32(__builtin_convertvector(bits, U32) << 16);
#endif
}

static inline F32 load(const half* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (F32)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  const U32 bits = __builtin_convertvector(*(const LooseU16*)p, U32), magnitude = bits & 0x7fffu;
  const F32 finite = as_f32(magnitude << 13) * set(0x1p112f);
  const U32 value = magnitude >= 0x7c00u ? (magnitude << 13 | 0x7f800000u) : as_u32(finite);
  return as_f32(value | (bits & 0x8000u) << 16);
#endif
}

static inline void store(bfloat16* p, F32 x) {
  const U32 u = as_u32(x);
  const U32 rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const U32 nan = u >> 16 | 0x40u;
  const U32 bits = (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  *(LooseU16*)p = __builtin_convertvector(bits, LooseU16);
}

static inline void store(half* p, F32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
#endif
}

/// Stores the first `n` < kLanes lanes; nothing past them is touched.
template <class T>
static inline void store_part(T* p, F32 x, int64_t n) {
  T lane[kLanes];
  store(lane, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

// Rows

/// Asks for memory that will be read or written soon. Whatever does nothing else must be inlined by force: GCC takes it
/// for a function without effect and drops its calls.
static __attribute__((always_inline)) inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

/// dst[0..n) = src[0..n) as float.
template <class T>
static inline void widen(const T* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

/// dst[0..n) = src[0..n) rounded to T.
template <class T>
static inline void narrow(const float* src, T* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) from_float(src[i], dst + i);
}

/// Interleaves the elements (Pair = 1) or pairs (Pair = 2) of a and b within each group of four lanes.
template <int Pair, int... L>
static inline void interleave_groups(F32& a, F32& b, Lanes<L...>) {
  const F32 low = __builtin_shufflevector(
      a, b, ((L & ~3) + (Pair == 1 ? (L & 3) / 2 : L & 1) + ((Pair == 1 ? L & 1 : L & 2) ? kLanes : 0))...);
  b = __builtin_shufflevector(
      a, b, ((L & ~3) + 2 + (Pair == 1 ? (L & 3) / 2 : L & 1) + ((Pair == 1 ? L & 1 : L & 2) ? kLanes : 0))...);
  a = low;
}

/// Swaps the off-diagonal Step x Step blocks of two vectors.
template <int Step, int... L>
static inline void exchange(F32& a, F32& b, Lanes<L...>) {
  const F32 low = __builtin_shufflevector(a, b, ((L & Step) ? kLanes + L - Step : L)...);
  b = __builtin_shufflevector(a, b, ((L & Step) ? kLanes + L : L + Step)...);
  a = low;
}

template <int Step>
static inline void exchange_all(F32* x) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Step)) exchange<Step>(x[i], x[i + Step], AllLanes{});
  if constexpr (2 * Step < kLanes) exchange_all<2 * Step>(x);
}

/// kLanes x kLanes: row i of the result is lane i of every input.
static inline void transpose(F32 (&x)[kLanes]) {
  for (int i = 0; i < kLanes; i += 4) {
    interleave_groups<1>(x[i], x[i + 1], AllLanes{}), interleave_groups<1>(x[i + 2], x[i + 3], AllLanes{});
    interleave_groups<2>(x[i], x[i + 2], AllLanes{}), interleave_groups<2>(x[i + 1], x[i + 3], AllLanes{});
    const F32 second = x[i + 2];
    x[i + 2] = x[i + 1], x[i + 1] = second;
  }
  if constexpr (kLanes > 4) exchange_all<4>(x);
}

}  // namespace subquad::cpu::SUBQUAD_ISA
