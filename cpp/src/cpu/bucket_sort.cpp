#include "cpu/table.h"

namespace subquad::cpu::SUBQUAD_ISA {

const Slot<BucketSortArgs> bucket_sort_slot = {};

}  // namespace subquad::cpu::SUBQUAD_ISA
