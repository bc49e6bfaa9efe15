/// What the tests of the selections share: the groups, the order of the entries of one, numbers of threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "subquad/options.h"

namespace check {

constexpr subquad::Group kGroups[] = {subquad::Group::query, subquad::Group::head, subquad::Group::batch,
                                      subquad::Group::row_heads};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// An entry of a group; places ascend in flat order.
struct Entry {
  float value;
  int64_t place;
};

static inline bool comes_first(const Entry& a, const Entry& b) {
  if (std::isnan(a.value) != std::isnan(b.value)) return std::isnan(b.value);
  if (!std::isnan(a.value) && a.value != b.value) return a.value > b.value;
  return a.place < b.place;
}

/// 2, 3 and 16 in turn.
static inline int other_threads() {
  static const int counts[] = {2, 3, 16};
  static int next = 0;
  return counts[next++ % 3];
}

}  // namespace check
