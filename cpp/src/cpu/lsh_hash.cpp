#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

const Slot<LshHashArgs> lsh_hash_slot = {};

}  // namespace subquad::cpu::SUBQUAD_ISA
