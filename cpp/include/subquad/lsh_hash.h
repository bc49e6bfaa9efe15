/// SimHash bucket codes: the sign pattern of random projections.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Codes from explicit hyperplanes.
///
///   codes[b,h,r,n] = sum_j 2^j * [ <x[b,h,n,:], planes[p,r,j,:]> > 0 ],   p = h / (H / Hp)
///
/// Source: Charikar, STOC 2002. One bit of two vectors agrees with probability 1 - angle(x, y) / pi. A zero vector, and
/// a NaN, gives bit 0.
///
/// @param x       [B, H, N, D]   f32 | f16 | bf16; last axis contiguous; D in [1, 512].
/// @param planes  [Hp, R, J, D]  f32; H a multiple of Hp; R = num_hashes in [1, 2^26], J = hash_bits in [1, 24].
/// @param codes   [B, H, R, N]   u16 (J <= 16) or i32; every element is written; must not overlap x or planes.
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512; on CUDA: above 256).
///
/// Promises: deterministic; asynchronous on a CUDA queue. Sums are f32, so two rows of CPU kernels may differ in bit j
/// only where |projection| <= D * 2^-23 * |x| * |plane|, and others, since tensor cores truncate, only where
/// |projection| <= (D + 8) * 2^-22 * |x| * |plane|.
SUBQUAD_API void lsh_hash(const Queue& queue, ConstTensor x, ConstTensor planes, Tensor codes, Workspace workspace);
SUBQUAD_API int64_t lsh_hash_workspace_bytes(const Queue& queue, ConstTensor x, ConstTensor planes, Tensor codes);

/// How the bits of a code are taken from the coordinates of the transforms.
/// strided: flat bit g = r*J + j is coordinate g / P of transform g mod P: the bits of a code come from different
///   transforms as far as possible, so collisions follow the hyperplane law closely.
/// published: code c of transform p is its coordinates c*J ... c*J + J - 1 (c < D2 / J), r = p * (D2 / J) + c. Bits
///   from one orthogonal transform are negatively dependent: collisions of far vectors are too rare (25 % at
///   D = 64, J = 9).
enum class Carving : uint8_t { strided, published };

/// P, the number of Hadamard transforms that `num_hashes` codes of `hash_bits` bits are carved from.
SUBQUAD_API int64_t hadamard_parts(int64_t num_hashes, int64_t hash_bits, int64_t dim, Carving carving);
/// D2, the power of two >= max(dim, 64) that vectors are zero-padded to.
SUBQUAD_API int64_t hadamard_padded(int64_t dim);

/// Codes from fast pseudo-random rotations.
///
///   y_p = W S[2,p] W S[1,p] W S[0,p] x,   W[i,k] = (-1)^popcount(i & k),   bit = [ y > 0 ]
///
/// Source: Andoni et al., NeurIPS 2015 (three rounds); Zeng et al., ICML 2021 (use in YOSO).
///
/// @param x       [B, H, N, D]       f32 | f16 | bf16; last axis contiguous; D in [1, 512].
/// @param signs   [Hp, 3, P, D2]     f32 of +1 and -1 (only the sign bit is read); P = hadamard_parts(R, hash_bits, D,
///        carving).
/// @param codes   [B, H, R, N]       u16 (hash_bits <= 16) or i32; must not overlap x or signs.
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512; on CUDA: above 256).
///
/// Promises: deterministic and bit-equal on every backend (additions only, in the fixed butterfly order of strides
/// 1, 2, 4, ...; rows outside [2^-100, 2^100] are first scaled by a power of two); asynchronous on a CUDA queue.
SUBQUAD_API void lsh_hash_hadamard(const Queue& queue, ConstTensor x, ConstTensor signs, int64_t hash_bits,
                                   Carving carving, Tensor codes, Workspace workspace);
SUBQUAD_API int64_t lsh_hash_hadamard_workspace_bytes(const Queue& queue, ConstTensor x, ConstTensor signs,
                                                      int64_t hash_bits, Carving carving, Tensor codes);

}  // namespace subquad
