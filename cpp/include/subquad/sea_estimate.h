/// The estimator of SEA: a compressed attention matrix, and how far to trust it, in linear time.
#pragma once
#include "subquad/tensor.h"

namespace subquad {

/// Learned parts, all f32 and contiguous but for the first of several axes. d = D, m features, H heads, K columns;
/// causal: w = K / 4, C = 2 H; bidirectional: w = K / 2, C = 4 H. Output s w + i of the row linear, s < C / H, i < w,
/// is column i of channel h C / H + s.
struct SeaWeights {
  ConstTensor projection;                              ///< [m, d] rows of the random projection
  ConstTensor position;                                ///< [P, d] causal only: one row per token
  ConstTensor encoder_weight, encoder_bias;            ///< [2d, 3d], [2d]
  ConstTensor encoder_norm_weight, encoder_norm_bias;  ///< [2d]
  ConstTensor scaler_weight, scaler_bias;              ///< [2, 2d], [2]: row 0 gives row_scale, row 1 gives mix
  ConstTensor row_weight, row_bias;                    ///< [w C / H, 2d], [w C / H]
  ConstTensor row_norm_weight, row_norm_bias;          ///< [w] causal only
  ConstTensor conv1_weight, conv1_bias;                ///< [C, C, 3, 3], [C]: output, input, time, column
  ConstTensor conv2_weight, conv2_bias;                ///< [C, C, 3, 3], [C]
  ConstTensor out_weight, out_bias;                    ///< [H, C] (causal) or [H, C, 3, 3], [H]
  ConstTensor norm_weight, norm_bias;                  ///< [K] causal only
};

/// What a causal pass leaves behind, so that the next one goes on as if both were one. Zeros before the first token.
struct SeaState {
  Tensor s;      ///< [B, H, m, 2d] f32: sum of phi(k) [position | v]^T
  Tensor z;      ///< [B, H, m]     f32: sum of phi(k)
  Tensor rows1;  ///< [B, C, 4, w]  f32: the last four rows of the normed row linear
  Tensor rows2;  ///< [B, C, 4, w]  f32: the last four rows behind the first convolution
  Tensor count;  ///< [B]           i32: tokens so far
};

struct SeaEstimateOptions {
  bool is_causal = false;
  ConstTensor key_mask;  ///< [B, N] bool, True = keep; optional. A masked token has no effect, and its rows are 0.
};

/// The estimator. All that counts tokens (positions, taps of the convolutions, lengths) counts the valid ones of an
/// item, so that padding changes nothing. For a valid token t of head h, with u = d^{-1/4} W x, W the projection:
///
///   phi(x)          = max(u, 0) + 1e-3 if causal, else m^{-1/2} (e^{u - |x|^2 / (2 d^{1/2}) - c} + 1e-4), c being the
///                   largest u of the query's features, or of all features of all keys of (b, h)
///   P_t             = row t of `position` if causal, else the identity matrix d x d interpolated at row
///                   t (d - 1) / (T - 1), T the item's number of valid tokens
///   C_t             = (phi(q_t) sum_j phi(k_j) [P_j | v_j]^T) / (phi(q_t) (eps + sum_j phi(k_j))), over j <= t with
///                   eps = 1e-6 if causal, else over all j with eps = 0
///   Z_t             = GELU(LayerNorm(encoder [C_t | v_t]))
///   row_scale, mix  = sigmoid(scaler Z_t)
///   causal:         R = LayerNorm(row linear Z); A = ReLU(conv1 R); Y = ReLU(conv2 A): 3 x 3 taps at t - 4, t - 2, t
///                   and columns -2, 0, +2, zeros outside; columns repeated 4 times; 1 x 1 to H channels of K + 2
///                   columns (one of zeros on either side); averaged over areas to K; LayerNorm; softmax
///   bidirectional:  R = row linear Z; ReLU(conv1, stride 2 in time), ReLU(conv2); rows repeated twice; out: all 3 x 3
///                   with padding 1; bilinear (half-pixel centres) to T rows of K columns; softmax
///
/// LayerNorm with eps 1e-5; GELU by erf. Source: Lee et al., ICLR 2024 (SEA), and its published code.
///
/// @param q, k, v  [B, H, N, D]  f32 | f16 | bf16, one dtype; D in [1, 512], N below 2^31
/// @param weights  as above; K a multiple of 4 (causal) or 2, in [4, 4096]; m in [1, 4096]
/// @param state    what came before (causal only): all of its members or none
/// @param probs    [B, H, N, K]  f32; every row of a valid token sums to 1
/// @param row_scale, mix  [B, H, N]  f32; every element of the outputs is written
/// @param new_state  behind the last token (causal only): all of its members or none; no output may overlap an input,
///                 the state that came in among them, or another output
/// @throws std::invalid_argument or TypeMismatch if a line above is violated, or an item has more tokens than
///         `position` has rows (checked on the CPU); Unsupported if no kernel fits.
///
/// Promises: linear time and memory in N; f32 throughout; causal rows do not change a bit when later tokens do; a call
/// cut anywhere with the state handed on gives what one call gives, up to rounding; deterministic, the same bits for
/// any number of threads; asynchronous on a CUDA queue.
SUBQUAD_API void sea_estimate(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                              const SeaWeights& weights, const SeaEstimateOptions& options, const SeaState& state,
                              Tensor probs, Tensor row_scale, Tensor mix, const SeaState& new_state,
                              Workspace workspace);
SUBQUAD_API int64_t sea_estimate_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                                 const SeaWeights& weights, const SeaEstimateOptions& options,
                                                 const SeaState& state, Tensor probs, Tensor row_scale, Tensor mix,
                                                 const SeaState& new_state);

}  // namespace subquad
