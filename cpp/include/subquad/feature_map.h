/// Random features whose inner products estimate (or replace) the softmax kernel.
#pragma once
#include "subquad/options.h"
#include "subquad/tensor.h"

namespace subquad {

/// F' for a projection of `num_features` rows, or for rows of `dim` elements where there is none.
SUBQUAD_API int64_t feature_dim(Features features, int64_t num_features, int64_t dim);

struct FeatureMapOptions {
  Features features = Features::positive;
  double scale = 0;  ///< s > 0; 0 stands for D^-1/2
  bool log = false;  ///< positive and hyperbolic: the logarithms of the features, which do not underflow. The constant
                     ///< -ln(F') / 2 is left out, for it cancels in every ratio.
  /// [B, N] bool, True = keep; optional. A masked token, even one of NaN, gives features 0 (logarithms and log_factor:
  /// -inf), gradient 0, and takes no part in dprojection.
  ConstTensor mask;
};

/// Feature maps.
///
///   out[b,h,n,:] = phi(x[b,h,n,:]),   E_w <phi(x), phi(y)> = e^{s <x, y>} for positive, trig and hyperbolic features
///
/// Source: Choromanski et al., ICLR 2021 (positive, hyperbolic, relu), Rahimi and Recht 2007, Peng et al., ICLR 2021
/// (trig), Katharopoulos et al., ICML 2020 (elu). The variance of one draw of the estimate of SM = e^{s <x, y>}, to be
/// divided by F: positive SM^2 (e^{|x~+y~|^2} - 1); hyperbolic half of SM^2 (e^z - 1) (1 - e^-z) with z = |x~+y~|^2;
/// trig half of e^{|x~|^2+|y~|^2} (1 - e^{-|x~-y~|^2})^2.
///
/// @param x           [B, H, N, D]   f32 | f16 | bf16; D in [1, 512]
/// @param projection  [Hp, F, D]     f32; Hp is 1 or divides H (head h uses row block h / (H / Hp)); none for elu
/// @param out         [B, H, N, F']  f32 | f16 | bf16; every element is written; must not overlap the inputs
/// @param log_factor  [B, H, N]      f32, trig only: |x~|^2 / 2; optional
/// @throws std::invalid_argument or TypeMismatch if a line above is violated; Unsupported if no kernel fits
///         (on the CPU: a head dimension above 512).
///
/// Promises: f32 arithmetic, |x~|^2 from x as given; no allocation beyond the workspace; deterministic, the same bits
/// for any number of threads; sines and cosines within 1e-7 for |<w_i, x~>| <= 1e4; features that overflow are the
/// caller's business (their logarithms do not); asynchronous on a CUDA queue.
SUBQUAD_API void feature_map(const Queue& queue, ConstTensor x, ConstTensor projection,
                             const FeatureMapOptions& options, Tensor out, Tensor log_factor, Workspace workspace);
SUBQUAD_API int64_t feature_map_workspace_bytes(const Queue& queue, ConstTensor x, ConstTensor projection,
                                                const FeatureMapOptions& options, Tensor out, Tensor log_factor);

/// Its gradient.
///
/// @param dout          [B, H, N, F']  f32 | f16 | bf16
/// @param dlog_factor   [B, H, N]      f32, trig only; optional
/// @param dx            [B, H, N, D]   f32 | f16 | bf16; optional
/// @param dprojection   [Hp, F, D]     f32; optional
/// The slope of relu at 0 is 0. Deterministic.
SUBQUAD_API void feature_map_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlog_factor, ConstTensor x,
                                 ConstTensor projection, const FeatureMapOptions& options, Tensor dx,
                                 Tensor dprojection, Workspace workspace);
SUBQUAD_API int64_t feature_map_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlog_factor,
                                                    ConstTensor x, ConstTensor projection,
                                                    const FeatureMapOptions& options, Tensor dx, Tensor dprojection);

}  // namespace subquad
