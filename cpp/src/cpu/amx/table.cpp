#include "cpu/table.h"

namespace subquad::cpu::x86_64_v4 {

const Kernels& table();

}  // namespace subquad::cpu::x86_64_v4

namespace subquad::cpu::SUBQUAD_ISA {

const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels overlay = x86_64_v4::table();
    overlay.collision_attention = collision_attention_slot;
    overlay.softmax_attention = softmax_attention_slot;
    return overlay;
  }();
  return kernels;
}

}  // namespace subquad::cpu::SUBQUAD_ISA
