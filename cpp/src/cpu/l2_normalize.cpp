#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

const Slot<L2NormalizeArgs> l2_normalize_slot = {};
const Slot<L2NormalizeArgs> l2_normalize_bwd_slot = {};

}  // namespace subquad::cpu::SUBQUAD_ISA
