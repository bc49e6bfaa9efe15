#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

const Slot<BucketAttentionArgs> bucket_attention_slot = {};
const Slot<BucketAttentionArgs> bucket_attention_bwd_slot = {};

}  // namespace subquad::cpu::SUBQUAD_ISA
