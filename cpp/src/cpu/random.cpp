#include "core/parallel.h"
#include "core/philox.h"
#include "cpu/simd.h"
#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {
namespace {

typedef uint64_t U64 __attribute__((vector_size(kLanes * 4)));

/// Products of the low halves of the 64-bit lanes.
inline U64 multiply_low_halves(U64 a, U64 b) {
#if defined(__AVX512F__)
  return (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // the unmasked word makes g++ 12 warn
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (U64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#endif
}

struct Product {
  U32 high, low;
};

/// The 64-bit products of all lanes with one factor, from those of the even and of the odd lanes.
inline Product multiply(U32 a, uint32_t factor) {
  const U64 b = U64{} + factor, low_half = U64{} + 0xffffffffu;
  const U64 even = multiply_low_halves((U64)a, b), odd = multiply_low_halves((U64)a >> 32, b);
  return {(U32)(even >> 32 | (odd & ~low_half)), (U32)((even & low_half) | odd << 32)};
}

/// philox::words with lane = counter; only the second word of the counter differs between the lanes.
inline void philox_words(uint64_t seed, uint32_t n, U32 c1, uint32_t l, uint32_t stream, U32 (&word)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  U32 c0 = set(n), c2 = set(l), c3 = set(stream);
  for (int round = 0; round < 10; ++round) {
    const Product a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ set(k0), c2 = a.high ^ c3 ^ set(k1);
    c1 = b.low, c3 = a.low;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// The functions below must give the same bits on every row: plain operations in the written order, no fma().

/// ln((w + 1) 2^-32) to about one unit in the last place, also where it is close to zero.
inline F32 log_of_word(U32 w) {
  // From sqrt(1/2) on the number is 1 - y 2^-32, below that it is y 2^-32; y = high + low, both exact as floats.
  const I32 near_one = w >= set(0xb504f333u);
  const U32 y = near_one ? ~w : w + 1u;
  const U32 low_bits = y >= set(0x01000000u) ? y & 0xffu : U32{};
  const F32 high = __builtin_convertvector(y - low_bits, F32), low = __builtin_convertvector((I32)low_bits, F32);
  // high 2^-32 or 1 - high 2^-32 as (1 + f) 2^e with 1 + f in [sqrt(1/2), sqrt(2)); f is exact.
  const U32 bits = as_u32(high) - 0x3f3504f3u;
  const F32 mantissa = as_f32((bits & 0x007fffffu) + 0x3f3504f3u);
  const F32 f = select(near_one, high * set(-0x1p-32f), mantissa - set(1.0f));
  const F32 e = __builtin_convertvector(select(near_one, I32{}, (I32)(bits >> 23) - 32), F32);
  const F32 rest = select(near_one, low * set(-0x1p-32f), low) / select(near_one, set(1.0f) + f, high);
  // log(1 + f) = f - f^2 / 2 + f^3 p(f) with p minimax; ln 2 in two parts, the first exact times e.
  F32 p = set(-0.0763442963f);
  p = p * f + set(0.127615497f);
  p = p * f + set(-0.131601945f);
  p = p * f + set(0.142017618f);
  p = p * f + set(-0.166233569f);
  p = p * f + set(0.200012267f);
  p = p * f + set(-0.250008225f);
  p = p * f + set(0.333333313f);
  const F32 square = f * f;
  const F32 small = square * f * p + (rest + e * set(-2.12194440e-4f)) - set(0.5f) * square;
  return (small + f) + e * set(0.693359375f);
}

struct CosSin {
  F32 cos, sin;
};

/// cos and sin of 2 pi w 2^-32.
inline CosSin cos_sin_of_word(U32 w) {
  // The quadrant and the signed distance from its middle axis are exact in integers. The leading product is exact too:
  // 12 bits of the distance times 12 bits of 2 pi 2^-32.
  const U32 quadrant = (w + 0x20000000u) >> 30, distance = w - (quadrant << 30);
  const F32 high = __builtin_convertvector((I32)(distance & 0xfffe0000u), F32);
  const F32 low = __builtin_convertvector((I32)(distance & 0x0001ffffu), F32);
  const F32 leading = high * set(0x1.92p-30f), rest = high * set(0x1.fb5444p-42f) + low * set(0x1.921fb6p-30f);
  const F32 x = leading + rest, square = x * x;
  F32 s = set(-1.95172979e-4f), c = set(2.44384501e-5f);
  s = s * square + set(8.33217800e-3f), c = c * square + set(-1.38873677e-3f);
  s = s * square + set(-0.166666552f), c = c * square + set(4.16666456e-2f);
  const F32 sine = leading + (rest + s * square * x);
  const F32 cosine = set(1.0f) - (set(0.5f) * square - c * square * square);
  const I32 swapped = (quadrant & 1u) != 0u;
  const U32 negative_cos = (quadrant + 1u) >> 1 << 31, negative_sin = quadrant >> 1 << 31;
  return {as_f32(as_u32(select(swapped, sine, cosine)) ^ negative_cos),
          as_f32(as_u32(select(swapped, cosine, sine)) ^ negative_sin)};
}

template <Distribution kDistribution>
inline void to_numbers(const U32 (&word)[4], F32 (&x)[4]) {
  if constexpr (kDistribution == Distribution::normal) {
    for (int i = 0; i < 4; i += 2) {
      const F32 radius = sqrt(set(-2.0f) * log_of_word(word[i]));
      const CosSin direction = cos_sin_of_word(word[i + 1]);
      x[i] = radius * direction.cos, x[i + 1] = radius * direction.sin;
    }
  } else {
    for (int i = 0; i < 4; ++i)
      x[i] = kDistribution == Distribution::uniform ? __builtin_convertvector((I32)(word[i] >> 8), F32) * set(0x1p-24f)
                                                    : as_f32((word[i] & 0x80000000u) | 0x3f800000u);
  }
}

/// a0 b0 a1 b1 ...
template <int... L>
inline void interleave(F32& a, F32& b, Lanes<L...>) {
  const F32 low = __builtin_shufflevector(a, b, ((L & 1 ? kLanes : 0) + L / 2)...);
  b = __builtin_shufflevector(a, b, ((L & 1 ? kLanes : 0) + kLanes / 2 + L / 2)...);
  a = low;
}

/// From one vector per word to the order of memory, where a counter's four words are neighbours.
inline void words_together(F32 (&x)[4]) {
  interleave(x[0], x[2], AllLanes{}), interleave(x[1], x[3], AllLanes{});
  interleave(x[0], x[1], AllLanes{}), interleave(x[2], x[3], AllLanes{});
}

/// out[first..last) of row (l, n); `first` is a multiple of 4.
template <Distribution kDistribution>
inline void fill_row(const RandomArgs& args, uint64_t seed, int64_t l, int64_t n, int64_t first, int64_t last) {
  float* out = static_cast<float*>(args.out.data) + l * args.out.stride[0] + n * args.out.stride[1];
  const U32 lane = (U32)lane_index();
  for (int64_t d = first; d < last; d += 4 * kLanes) {
    U32 word[4];
    F32 x[4];
    philox_words(seed, uint32_t(n), lane + uint32_t(d / 4), uint32_t(l), args.stream, word);
    to_numbers<kDistribution>(word, x);
    words_together(x);
    for (int i = 0; i < 4; ++i) {
      const int64_t at = d + i * kLanes;
      if (at + kLanes <= last)
        store(out + at, x[i]);
      else if (at < last)
        store_part(out + at, x[i], last - at);
    }
  }
}

template <Distribution kDistribution>
void fill(const Queue& queue, const RandomArgs& args) {
  const uint64_t seed = args.seed_ptr ? uint64_t(*args.seed_ptr) : args.seed;
  // A task is some tens of microseconds of work: several short rows, or a piece of a long one.
  const int64_t kTask = 16384;
  const int64_t pieces = (args.cols + kTask - 1) / kTask, rows_a_task = args.cols < kTask ? kTask / args.cols : 1;
  const int64_t rows = args.leading * args.rows, groups = (rows + rows_a_task - 1) / rows_a_task;
  core::parallel_for(queue, groups * pieces, [&](int64_t task, int) {
    const int64_t row = task / pieces * rows_a_task, first = task % pieces * kTask;
    const int64_t row_end = row + rows_a_task < rows ? row + rows_a_task : rows;
    const int64_t last = first + kTask < args.cols ? first + kTask : args.cols;
    for (int64_t i = row; i < row_end; ++i)
      fill_row<kDistribution>(args, seed, i / args.rows, i % args.rows, first, last);
  });
}

const char* supports(const RandomArgs&) { return nullptr; }

int64_t workspace_bytes(const Queue&, const RandomArgs&) { return 0; }

const char* run(const Queue& queue, const RandomArgs& args, void*) {
  if (args.distribution == Distribution::uniform) fill<Distribution::uniform>(queue, args);
  if (args.distribution == Distribution::normal) fill<Distribution::normal>(queue, args);
  if (args.distribution == Distribution::sign) fill<Distribution::sign>(queue, args);
  return nullptr;
}

}  // namespace

const Slot<RandomArgs> random_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cpu::SUBQUAD_ISA
