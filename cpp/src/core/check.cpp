#include "core/check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace subquad::core {
namespace {

std::string join(const std::string* parts, size_t count, const char* separator) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += (i ? separator : "") + parts[i];
  return text;
}

std::string axes_string(std::initializer_list<Axis> axes) {
  std::string letters, extents;
  bool known = true;
  for (const Axis& axis : axes) {
    const char* separator = letters.empty() ? "" : ", ";
    letters += separator + std::string(axis.letter);
    extents += separator + std::to_string(axis.extent);
    known &= axis.extent != kAny;
  }
  return "shape [" + letters + "]" + (known ? " = [" + extents + "]" : "");
}

struct Extent {
  uintptr_t begin, end;
};

/// The bytes between the lowest and the highest element of a view that has elements.
Extent extent_of(const ConstTensor& t) {
  int64_t low = 0, high = 0;
  for (int i = 0; i < t.rank; ++i) {
    const int64_t reach = (t.shape[i] - 1) * t.stride[i];
    (reach < 0 ? low : high) += reach;
  }
  const uintptr_t base = reinterpret_cast<uintptr_t>(t.data);
  const int64_t size = dtype_bytes(t.dtype);
  return {base + uintptr_t(low * size), base + uintptr_t((high + 1) * size)};
}

/// True when the axes, sorted by stride, each step over everything the smaller ones reach.
bool has_distinct_elements(const ConstTensor& t) {
  int order[kMaxRank], count = 0;
  for (int i = 0; i < t.rank; ++i)
    if (t.shape[i] > 1) order[count++] = i;
  const auto magnitude = [&](int axis) { return std::abs(t.stride[axis]); };
  for (int i = 1; i < count; ++i)
    for (int j = i; j > 0 && magnitude(order[j]) < magnitude(order[j - 1]); --j) std::swap(order[j], order[j - 1]);
  int64_t reach = 0;
  for (int i = 0; i < count; ++i) {
    if (magnitude(order[i]) <= reach) return false;
    reach += (t.shape[order[i]] - 1) * magnitude(order[i]);
  }
  return true;
}

}  // namespace

void invalid(const char* op, const char* argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument("[" + std::string(op) + "] " + argument + ": expected " + expected + ", got " + got);
}

void mismatch(const char* op, const char* argument, const std::string& expected, const std::string& got) {
  throw TypeMismatch("[" + std::string(op) + "] " + argument + ": expected " + expected + ", got " + got);
}

void unsupported(const char* op, const std::string& reason) {
  throw Unsupported("[" + std::string(op) + "] " + reason);
}

std::string to_string(DType dtype) {
  static const char* const names[] = {"none",  "float32", "float16", "bfloat16", "int64",
                                      "int32", "uint16",  "uint8",   "bool"};
  return names[int(dtype)];
}

std::string to_string(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string shape_string(const ConstTensor& t) {
  std::string parts[kMaxRank];
  for (int i = 0; i < t.rank; ++i) parts[i] = std::to_string(t.shape[i]);
  return "[" + join(parts, size_t(t.rank), ", ") + "]";
}

std::string at_place(std::initializer_list<int64_t> place) {
  std::string text;
  for (int64_t index : place) text += (text.empty() ? "" : ", ") + std::to_string(index);
  return " at [" + text + "]";
}

void check_array(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                 std::initializer_list<Axis> axes, std::initializer_list<DType> dtypes) {
  if (!t.defined()) mismatch(op, argument, "an array", "none");
  if (std::find(dtypes.begin(), dtypes.end(), t.dtype) == dtypes.end()) {
    std::string names[8];
    size_t count = 0;
    for (DType dtype : dtypes) names[count++] = to_string(dtype);
    mismatch(op, argument, "dtype " + join(names, count, " or "), to_string(t.dtype));
  }
  bool matches = size_t(t.rank) == axes.size();
  if (matches) {
    int i = 0;
    for (const Axis& axis : axes) matches &= axis.extent == kAny || axis.extent == t.shape[i], ++i;
  }
  if (!matches) invalid(op, argument, axes_string(axes), shape_string(t));
  if (t.device.type != queue.device.type || t.device.index != queue.device.index)
    mismatch(op, argument, "an array on " + to_string(queue.device), to_string(t.device));
  const int last = t.rank - 1;
  if (last >= 0 && t.shape[last] > 1 && t.stride[last] != 1 && t.numel() > 0)
    invalid(op, argument, "a contiguous last axis (make one with .contiguous() or numpy.ascontiguousarray)",
            "stride " + std::to_string(t.stride[last]));
  if (t.numel() > 0 && reinterpret_cast<uintptr_t>(t.data) % uintptr_t(dtype_bytes(t.dtype)) != 0)
    invalid(op, argument, "data aligned to its element size", "an unaligned address");
}

void check_range(const char* op, const char* argument, int64_t value, int64_t lo, int64_t hi) {
  if (value < lo || value > hi)
    invalid(op, argument, "a value in [" + std::to_string(lo) + ", " + std::to_string(hi) + "]", std::to_string(value));
}

void check_not_empty(const char* op, const char* argument, const char* letter, int64_t extent) {
  if (extent == 0) invalid(op, argument, letter + std::string(" of at least 1"), "0");
}

float check_scale(const char* op, const char* argument, double scale, int64_t dim) {
  if (scale == 0) return float(1 / std::sqrt(double(dim)));
  if (!(float(scale) > 0 && std::isfinite(float(scale))))
    invalid(op, argument, "a finite number above 0", std::to_string(scale));
  return float(scale);
}

void check_groups(const char* op, const char* argument, int64_t heads_q, int64_t heads_kv) {
  const bool fits = heads_kv == 0 ? heads_q == 0 : heads_q % heads_kv == 0;
  if (!fits)
    invalid(op, argument, "a number of heads that divides the " + std::to_string(heads_q) + " query heads",
            std::to_string(heads_kv));
}

void check_output(const char* op, const char* argument, const ConstTensor& output,
                  std::initializer_list<const ConstTensor*> others) {
  if (!output.defined() || output.numel() == 0) return;
  if (!has_distinct_elements(output))
    invalid(op, argument, "an output whose elements have memory of their own", "overlapping strides");
  const Extent own = extent_of(output);
  for (const ConstTensor* other : others) {
    if (!other->defined() || other->numel() == 0) continue;
    const Extent theirs = extent_of(*other);
    if (own.begin < theirs.end && theirs.begin < own.end)
      invalid(op, argument, "an output that shares no memory with another argument", "an overlapping array");
  }
}

void check_workspace(const char* op, const Workspace& workspace, int64_t bytes) {
  if (workspace.bytes < bytes || (bytes > 0 && !workspace.data))
    invalid(op, "workspace", "at least " + std::to_string(bytes) + " bytes", std::to_string(workspace.bytes));
}

Operand operand(const ConstTensor& t) {
  Operand o = {};
  if (!t.defined()) return o;
  o.data = const_cast<void*>(t.data);
  o.dtype = t.dtype;
  for (int i = 0; i < t.rank && i < 4; ++i) o.stride[i] = t.stride[i];
  return o;
}

}  // namespace subquad::core
