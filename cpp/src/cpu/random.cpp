#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

const Slot<RandomArgs> random_slot = {};

}  // namespace subquad::cpu::SUBQUAD_ISA
