/// The named choices that kernels read too.
#pragma once
#include <cstdint>

namespace subquad {

/// Feature maps. Rows w_i, i < F, are those of a projection, and x~ = sqrt(s) x.
enum class Features : int32_t {
  positive,  ///< F' = F:  e^{<w_i, x~> - |x~|^2 / 2} / sqrt(F)
  trig,  ///< F' = 2F: [sin <w_i, x~>, cos <w_i, x~>] / sqrt(F), and the factor e^{|x~|^2 / 2} apart as its logarithm
  hyperbolic,  ///< F' = 2F: [e^{<w_i, x~> - |x~|^2 / 2}, e^{-<w_i, x~> - |x~|^2 / 2}] / sqrt(2 F)
  relu,        ///< F' = F:  max(0, <w_i, x~>) + 1e-3 / sqrt(F)
  elu,         ///< F' = D:  x + 1 where x > 0, else e^x; no projection, no scale
};

/// How the rows of an orthogonal projection are made.
enum class ProjectionKind : int32_t {
  haar,      ///< rows of Haar orthogonal matrices, with the lengths of normal vectors: every row is N(0, I) exactly
  hadamard,  ///< rows of H D H D H D (Walsh-Hadamard, random signs), with the lengths of normal vectors: nearly N(0, I)
  published,  ///< Householder QR without the sign fix, as in the published codes: rows are not N(0, I), and positive
              ///< features are biased by tens of per cent
};

/// How the estimates of several proposals are combined (multiple importance sampling).
enum class Mis : int32_t {
  opt,     ///< weights max(1e-8, B_j + alpha_coeff (t_nc - mean_c' t_nc')), c = j mod C; density: the own one
  bh,      ///< the balance heuristic: weights 1; density: that of the mixture
  biased,  ///< weights e^{s <mu_c, q_n>}; density: that of the mixture; does not converge to softmax attention
};

/// Over which entries a selection compares: scores [B, H, N, L] of queries n and columns (or keys) l, flattened in the
/// order of the axes.
enum class Group : int32_t {
  query,      ///< the L entries of one (b, h, n)
  head,       ///< the N L entries of one (b, h)
  batch,      ///< the H N L entries of one b
  row_heads,  ///< the H L entries of one (b, n)
};

/// How many columns a group of SEA keeps; see select_blocks.h.
enum class BudgetRule : int32_t {
  code,   ///< of the published code: rounded once for the whole group
  paper,  ///< of the paper's text: at least 1 for every row
};

}  // namespace subquad
