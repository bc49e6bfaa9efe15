/// Reproducible random arrays: the same bits on every backend, for any batch size, tiling or number of threads.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// A seed: an integer, or the address of one in the memory of the queue's device, read when the kernel runs.
struct Seed {
  uint64_t value = 0;
  const int64_t* pointer = nullptr;

  Seed() = default;
  Seed(uint64_t v) : value(v) {}
};

/// Uniform numbers from a counter.
///
///   out[l,n,d] = 2^-24 * floor(word / 2^8),   word = word d % 4 of Philox4x32-10(counter = (n, d / 4, l, stream), key
/// = seed)
///
/// with l the flat index over all axes before the last two (missing axes count as 1).
/// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
///
/// @param stream  an independent sequence per number; 1 to 15 are the library's own draws (1 hash planes, 2 Hadamard
///                signs, 3 pairs of the sampled gradient, 4 to 6 projections, 7 noise, 8 drawn keys), 0 and 16 on are
///                free.
/// @param out     [..., H, N, D]  f32, rank at most 6; every element is written; N and H-and-before at most 2^32;
///                the axes before the last two must flatten to one without a copy.
/// @throws std::invalid_argument or TypeMismatch if a line above is violated.
///
/// Promises: no allocation; bit-equal on every backend; asynchronous on a CUDA queue.
SUBQUAD_API void random_uniform(const Queue& queue, Seed seed, uint32_t stream, Tensor out);

/// Standard normal numbers from the same counter, by Box-Muller on the word pairs (0, 1) and (2, 3):
///
///   r = sqrt(-2 ln((w0 + 1) 2^-32)),  out = (r cos(2 pi w1 2^-32), r sin(2 pi w1 2^-32))
///
/// Promises: as random_uniform, but backends may differ by 2 ulp; all CPU rows are bit-equal. |out| < 6.7.
SUBQUAD_API void random_normal(const Queue& queue, Seed seed, uint32_t stream, Tensor out);

/// Independent signs from the same counter: -1 where bit 31 of the word is set, else +1.
///
/// Promises: as random_uniform.
SUBQUAD_API void random_signs(const Queue& queue, Seed seed, uint32_t stream, Tensor out);

}  // namespace subquad
