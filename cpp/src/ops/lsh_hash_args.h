/// Arguments of the lsh_hash kernels.
#pragma once
#include "core/operand.h"

namespace subquad {

struct LshHashArgs {
  int64_t batch, heads, seq, dim;
  int64_t plane_heads;  // heads of planes or signs; head h uses plane head h / (heads / plane_heads)
  int32_t num_hashes, hash_bits;
  bool hadamard;          // signs, else planes
  bool strided;           // carving of Hadamard bits: strided, else published
  int32_t parts, padded;  // Hadamard: P transforms of D2 = padded coordinates
  Operand x;              // [B, H, N, D]      f32 | f16 | bf16
  Operand planes;         // [Hp, R, J, D]     f32
  Operand signs;          // [Hp, 3, P, D2]    f32, +1 or -1
  Operand codes;          // [B, H, R, N]      u16 | i32
};

}  // namespace subquad
