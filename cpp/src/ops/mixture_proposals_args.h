/// Arguments of the mixture_proposals kernels.
#pragma once
#include "core/operand.h"
#include "subquad/options.h"

namespace subquad {

struct MixtureProposalsArgs {
  int64_t batch, heads_q, heads_kv, landmarks, samples, dim;  // samples is J
  float scale, noise_std;
  bool antithetic;
  Mis mis;
  Operand q_bar, k_bar;            // [B, H, C, D], [B, Hkv, C, D]   f32 | f16 | bf16
  Operand noise;                   // [B, H, J or J / 2, D]          f32, optional; stride 0 where all items share it
  Operand counts;                  // [B, C]                         i32, optional
  Operand w, keys;                 // forward: [B, H, J, D]          f32; keys optional
  Operand log_density, balance;    // forward: [B, H, J]             f32; balance optional
  Operand dw, dkeys;               // backward: [B, H, J, D]         f32, optional
  Operand dlog_density, dbalance;  // backward: [B, H, J]          f32, optional
  Operand dmu;                     // backward: [B, H, C, D]       f32
};

}  // namespace subquad
