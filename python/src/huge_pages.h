/// Large arrays in large pages: without them a result of 64 MiB costs 16384 page faults, more time than computing it.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace subquad::python {

constexpr int64_t kHugePage = int64_t(2) << 20;
constexpr int64_t kHugeEnough = 2 * kHugePage;

/// Asks the system to back the whole huge pages inside a block that is about to be written with huge pages; what numpy
/// does for its own large arrays. A hint: nothing happens where it is refused, or to pages that are there already.
inline void prefer_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kHugeEnough) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~uintptr_t(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace subquad::python
