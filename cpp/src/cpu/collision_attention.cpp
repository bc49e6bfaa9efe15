#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

const Slot<CollisionAttentionArgs> collision_attention_slot = {};
const Slot<CollisionAttentionArgs> collision_attention_bwd_slot = {};

}  // namespace subquad::cpu::SUBQUAD_ISA
