/// Samples of a mixture of Gaussian proposals centred at landmarks, with their log-densities: the first half of LARA.
#pragma once
#include "subquad/options.h"
#include "subquad/tensor.h"

namespace subquad {

struct MixtureProposalsOptions {
  double scale = 0;         ///< s > 0; 0 stands for D^-1/2
  double noise_std = 1;     ///< multiplies the noise
  bool antithetic = false;  ///< noise has J / 2 rows, and sample j >= J / 2 takes the negated row j - J / 2
  Mis mis = Mis::opt;
  ConstTensor counts;  ///< [B, C] i32: landmark c of item b exists where counts > 0; optional, default all
};

/// Samples and their log-densities, up to constants that cancel.
///
///   mu_c = q_bar_c + k_bar_c,   w_j = mu_c(j) + noise_std noise_j,   c(j) = j mod C,
///   l_jc = s <w_j, mu_c> - s |mu_c|^2 / 2,   m_j = ln sum_c e^{l_jc} over the landmarks that exist,
///   log_density_j = l_{j,c(j)} (opt) or m_j (bh, biased), +inf where landmark c(j) does not exist,
///   balance_j = e^{l_{j,c(j)} - m_j} / R (opt), R = J / C,   keys_j = w_j, or w_j + mu_c(j) (biased)
///
/// Source: Zheng et al., ICML 2022 (LARA); Veach and Guibas 1995 (balance heuristic).
///
/// @param q_bar        [B, H, C, D]      f32 | f16 | bf16; D in [1, 512]
/// @param k_bar        [B, Hkv, C, D]    f32 | f16 | bf16; H a multiple of Hkv
/// @param noise        [1 | B, H, J, D]  f32, J a multiple of C; none: no noise, J = C
/// @param w            [B, H, J, D]  f32
/// @param keys         [B, H, J, D]  f32; biased only, else undefined: it would be w
/// @param log_density  [B, H, J]     f32
/// @param balance      [B, H, J]     f32; opt only, else undefined
/// Outputs must not overlap the inputs or each other.
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits.
///
/// Promises: O(J C D) time; f32 sums; deterministic; asynchronous on a CUDA queue.
struct MixtureProposals {
  Tensor w, keys, log_density, balance;
};
SUBQUAD_API void mixture_proposals(const Queue& queue, ConstTensor q_bar, ConstTensor k_bar, ConstTensor noise,
                                   const MixtureProposalsOptions& options, const MixtureProposals& result,
                                   Workspace workspace);
SUBQUAD_API int64_t mixture_proposals_workspace_bytes(const Queue& queue, ConstTensor q_bar, ConstTensor k_bar,
                                                      ConstTensor noise, const MixtureProposalsOptions& options,
                                                      const MixtureProposals& result);

/// Its gradient; noise is a constant, landmarks that do not exist get 0.
///
/// @param cotangents  of w, keys, log_density and balance; undefined members count as zero
/// @param dmu         [B, H, C, D]  f32: the gradient for q_bar, and summed over the heads of a group that for k_bar
struct MixtureProposalsCotangents {
  ConstTensor dw, dkeys, dlog_density, dbalance;
};
SUBQUAD_API void mixture_proposals_bwd(const Queue& queue, const MixtureProposalsCotangents& cotangents,
                                       ConstTensor q_bar, ConstTensor k_bar, ConstTensor noise,
                                       const MixtureProposalsOptions& options, Tensor dmu, Workspace workspace);
SUBQUAD_API int64_t mixture_proposals_bwd_workspace_bytes(const Queue& queue,
                                                          const MixtureProposalsCotangents& cotangents,
                                                          ConstTensor q_bar, ConstTensor k_bar, ConstTensor noise,
                                                          const MixtureProposalsOptions& options, Tensor dmu);

}  // namespace subquad
