/// Counts and positions of visible keys: shapes, and on the CPU their values.
#pragma once
#include "core/check.h"

namespace subquad::ops {

/// visible [B, N] and, where given, positions [B, M].
inline void check_visible(const char* op, const Queue& queue, const ConstTensor& visible, const ConstTensor& positions,
                          int64_t batch, int64_t seq_q, int64_t seq_k) {
  core::check_array(op, "visible", queue, visible, {{"B", batch}, {"N", seq_q}}, {DType::i32});
  if (positions.defined())
    core::check_array(op, "positions", queue, positions, {{"B", batch}, {"M", seq_k}}, {DType::i32});
}

/// Checks that counts lie in [0, seq_k] and that the positions they reach are keys in ascending order. Reads the
/// arrays: for queues on the CPU, and only when the operator runs.
inline void check_visible_values(const char* op, const Queue& queue, const Operand& visible, const Operand& positions,
                                 int64_t batch, int64_t seq_q, int64_t seq_k) {
  if (queue.device.type != DeviceType::cpu) return;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t *counts = element<int32_t>(visible, b), *keys = element<int32_t>(positions, b);
    int32_t most = 0;
    for (int64_t n = 0; n < seq_q; ++n) {
      if (counts[n] < 0 || counts[n] > seq_k)
        core::invalid(op, "visible", "values in [0, " + std::to_string(seq_k) + "]",
                      std::to_string(counts[n]) + core::at_place({b, n}));
      most = counts[n] > most ? counts[n] : most;
    }
    for (int64_t r = 0; positions.data && r < most; ++r) {
      const bool ascends = r == 0 ? keys[0] >= 0 : keys[r] > keys[r - 1];
      if (!ascends || keys[r] >= seq_k)
        core::invalid(
            op, "positions",
            "ascending keys in [0, " + std::to_string(seq_k) + ") for the first " + std::to_string(most) + " ranks",
            std::to_string(keys[r]) + (r ? " after " + std::to_string(keys[r - 1]) : "") + core::at_place({b, r}));
    }
  }
}

}  // namespace subquad::ops
