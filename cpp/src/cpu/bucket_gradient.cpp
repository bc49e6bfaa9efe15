#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

const Slot<BucketGradientArgs> bucket_gradient_slot = {};

}  // namespace subquad::cpu::SUBQUAD_ISA
