/// Counter-based random bits: the same word for the same (seed, stream, place), whatever the batch, tiling or backend.
///
///   words(seed, c0, c1, c2, c3) = Philox4x32-10 with key = (low, high) half of the seed
///
/// Source: Salmon et al., SC 2011. An array of shape [..., H, N, D] takes word d % 4 of the counter
/// (n, d / 4, l, stream), where l is the flat index over all axes before the last two.
#pragma once
#include <cstdint>

#include "subquad/dtype.h"

namespace subquad::philox {

/// The last counter word of each draw of the library; numbers of users' own draws are free from 16 on.
enum Stream : uint32_t {
  kUser = 0,
  kPlanes = 1,
  kSigns = 2,
  kPairs = 3,
  kProjection = 4,
  kLengths = 5,
  kProjectionSigns = 6,
  kNoise = 7,
  kSamples = 8,
};

struct Words {
  uint32_t w[4];
};

static SUBQUAD_HD inline Words words(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0, n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b), c3 = uint32_t(a), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// Uniform on {0, 1, ..., n - 1}; the bias is at most n / 2^32.
static SUBQUAD_HD inline int64_t below(uint32_t word, int64_t n) { return int64_t(uint64_t(word) * uint64_t(n) >> 32); }

}  // namespace subquad::philox
