#include "cpu/detect.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace subquad::cpu {

#if defined(__x86_64__)
namespace {

struct Leaf {
  uint32_t eax, ebx, ecx, edx;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf r = {};
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

/// Register sets that the operating system saves (XCR0); 0 if it does not say.
uint64_t saved_registers() {
  if (!(cpuid(1, 0).ecx & bit_OSXSAVE)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

// Every feature of the psABI level, not just the famous one: a CPU may have one without the other.
bool has_v3() {
  const uint64_t kYmm = 0x6;
  const uint32_t kLeaf1 = bit_SSE3 | bit_SSSE3 | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT | bit_FMA |
                          bit_MOVBE | bit_OSXSAVE | bit_AVX | bit_F16C;
  const uint32_t kLeaf7 = bit_AVX2 | bit_BMI | bit_BMI2;
  return all(saved_registers(), kYmm) && all(cpuid(1, 0).ecx, kLeaf1) && all(cpuid(7, 0).ebx, kLeaf7) &&
         all(cpuid(0x80000001u, 0).ecx, bit_LZCNT | bit_LAHF_LM);
}

bool has_v4() {
  const uint64_t kZmm = 0xe6;
  const uint32_t kLeaf7 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
  return has_v3() && all(saved_registers(), kZmm) && all(cpuid(7, 0).ebx, kLeaf7);
}

/// Linux grants the tile registers to a process only when it asks (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool tiles_granted() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

bool has_amx() {
  const uint32_t kTile = 1u << 24, kTileBf16 = 1u << 22, kAvx512Bf16 = 1u << 5;
  return has_v4() && all(saved_registers(), 0x60000) && all(cpuid(7, 0).edx, kTile | kTileBf16) &&
         all(cpuid(7, 1).eax, kAvx512Bf16) && tiles_granted();
}

}  // namespace

bool can_run(const char* row) {
  if (!std::strcmp(row, "x86_64")) return true;
  if (!std::strcmp(row, "x86_64_v3")) return has_v3();
  if (!std::strcmp(row, "x86_64_v4")) return has_v4();
  if (!std::strcmp(row, "x86_64_amx")) return has_amx();
  return false;
}

#else

bool can_run(const char* row) { return !std::strcmp(row, "neon"); }

#endif

}  // namespace subquad::cpu
