/// Codes cut from a stream of bits, and one bit string woven from many.
#pragma once
#include "device/warp.cuh"

namespace subquad::cuda {

/// Codes of one token, `stride` apart, as i32 or u16.
struct CodeColumn {
  void* data;
  int64_t stride;
  bool wide;

  __device__ void store(int64_t r, uint32_t code) const {
    if (wide)
      static_cast<int32_t*>(data)[r * stride] = int32_t(code);
    else
      static_cast<uint16_t*>(data)[r * stride] = uint16_t(code);
  }
  __device__ uint32_t load(int64_t r) const {
    return wide ? uint32_t(static_cast<const int32_t*>(data)[r * stride])
                : static_cast<const uint16_t*>(data)[r * stride];
  }
};

/// Writes codes next ... end - 1 of `bits` bits (at most 24) from 32-bit words, the first bit of a word its lowest.
struct CodeStream {
  CodeColumn column;
  int bits;
  int32_t next, end;
  uint32_t pending = 0;  // fewer bits than a code has
  int filled = 0;

  __device__ CodeStream(const CodeColumn& column_, int bits_, int32_t next_, int32_t end_)
      : column(column_), bits(bits_), next(next_), end(end_) {}

  __device__ void push(uint32_t word, int skip = 0) {
    if (next == end) return;
    uint64_t all = uint64_t(word >> skip) << filled | pending;
    for (filled += 32 - skip; filled >= bits && next < end; filled -= bits, all >>= bits, ++next)
      column.store(next, uint32_t(all) & ((1u << bits) - 1));
    pending = uint32_t(all);
  }
};

/// Moves bit i of a word to bit i * stride, while that is below 32: first halves, then quarters, ... move apart.
struct BitSpread {
  int steps;
  uint32_t low;  // the bits that have a place
  int shift[4];
  uint32_t mask[4];

  __device__ uint32_t operator()(uint32_t x) const {
    x &= low;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < steps) x = (x | x << shift[i]) & mask[i];
    return x;
  }
};

/// `stride` is 1 to 32.
static inline BitSpread spread_bits(int stride) {
  BitSpread spread = {};
  int kept = 1;
  while (kept * stride < 32) kept *= 2;
  spread.low = kept == 32 ? 0xffffffffu : (1u << kept) - 1;
  if (stride == 1) return spread;
  for (int half = kept / 2; half > 0; half /= 2, ++spread.steps) {
    spread.shift[spread.steps] = half * (stride - 1);
    for (int at = 0; at < 32; at += half * stride) spread.mask[spread.steps] |= ((1u << half) - 1) << at;
  }
  return spread;
}

/// The words of `strings` bit strings (at most 32) of 32 * `words` bits, bit g of the result being bit g / strings of
/// string g mod strings. Word w of string s lies at source[(s * words + w) * pitch].
struct BitWeave {
  const BitSpread& spread;
  const uint32_t* source;
  int pitch, words, strings, at, string;  // the next bit is bit `at` of `string`

  /// From word `first` of the result on.
  __device__ BitWeave(const BitSpread& spread_, const uint32_t* source_, int pitch_, int words_, int strings_,
                      int first)
      : spread(spread_),
        source(source_),
        pitch(pitch_),
        words(words_),
        strings(strings_),
        at(32 * first / strings_),
        string(32 * first % strings_) {}

  __device__ uint32_t next() {
    uint32_t result = 0;
    int s = string, from = at;
    for (int i = 0; i < strings; ++i) {
      const uint32_t* word = source + (s * words + from / 32) * pitch;
      const uint32_t high = from / 32 + 1 < words ? word[pitch] : 0;
      result |= spread(__funnelshift_r(word[0], high, unsigned(from % 32))) << i;
      if (++s == strings) s = 0, ++from;
    }
    at += 32 / strings, string += 32 % strings;
    if (string >= strings) string -= strings, ++at;
    return result;
  }
};

}  // namespace subquad::cuda
