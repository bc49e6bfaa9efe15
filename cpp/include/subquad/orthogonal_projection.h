/// Random projections with orthogonal rows, for feature maps.
#pragma once
#include "subquad/options.h"
#include "subquad/random.h"
#include "subquad/tensor.h"

namespace subquad {

/// Orthogonal random projections.
///
///   out[h,i,:] = |z_i| u_i,   z_i ~ N(0, I_D),   u_i rows of an orthogonal D x D matrix, a fresh one for every D rows
///
/// The last block of a head is cut. haar: Q of the QR decomposition of a normal matrix, with the signs of the columns
/// of Q multiplied by those of the diagonal of R, then transposed. published: without those signs, Q as Householder
/// reflections in LAPACK's convention leave it. hadamard: rows of H D_3 H D_2 H D_1 with D padded to the next power of
/// two D2, cut to D elements and scaled to keep E |u_i|^2 = 1.
/// Source: Yu et al., NeurIPS 2016; Mezzadri, Notices of the AMS 2007 (the sign fix).
///
/// @param out  [H, F, D]  f32; every element is written; D in [1, 512]
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512).
///
/// Promises: rows of one block are orthogonal to 1e-5 (hadamard: where D = D2; its blocks have D2 rows); the same for
/// the same seed, whatever F (a longer projection begins with the shorter one) and whatever other heads are drawn; the
/// same bits for any number of threads; asynchronous on a CUDA queue. Draws: stream 4 (normal blocks: element (h, i, d)
/// of an array [H, F rounded up to D, D]), 5 (z: [H, F, D]) and 6 (signs [H, 3 blocks, D2]: D_1, D_2, D_3 of a block).
SUBQUAD_API void orthogonal_projection(const Queue& queue, Seed seed, ProjectionKind kind, Tensor out,
                                       Workspace workspace);
SUBQUAD_API int64_t orthogonal_projection_workspace_bytes(const Queue& queue, Seed seed, ProjectionKind kind,
                                                          Tensor out);

}  // namespace subquad
