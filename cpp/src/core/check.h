/// The user's errors, in one grammar: `[op] argument: expected RULE, got VALUE`. Used by ops and methods only.
#pragma once
#include <initializer_list>
#include <string>

#include "core/operand.h"
#include "subquad/error.h"
#include "subquad/tensor.h"

namespace subquad::core {

[[noreturn]] void invalid(const char* op, const char* argument, const std::string& expected, const std::string& got);
[[noreturn]] void mismatch(const char* op, const char* argument, const std::string& expected, const std::string& got);
[[noreturn]] void unsupported(const char* op, const std::string& reason);

/// Letters and their extents, for example {{"B", 2}, {"H", 8}}; an extent of kAny is read from the array.
struct Axis {
  const char* letter;
  int64_t extent;
};
inline constexpr int64_t kAny = -1;

std::string to_string(DType dtype);
std::string to_string(Device device);
std::string shape_string(const ConstTensor& t);
/// " at [i, j]", behind a value that is wrong.
std::string at_place(std::initializer_list<int64_t> place);

/// Checks rank, extents, dtype, device and the contiguous last axis. `axes` in order; `dtypes` the allowed ones.
void check_array(const char* op, const char* argument, const Queue& queue, const ConstTensor& t,
                 std::initializer_list<Axis> axes, std::initializer_list<DType> dtypes);

/// Checks lo <= value <= hi.
void check_range(const char* op, const char* argument, int64_t value, int64_t lo, int64_t hi);

/// Checks that an axis of the array is not empty.
void check_not_empty(const char* op, const char* argument, const char* letter, int64_t extent);

/// Checks a scale, of which 0 stands for dim^-1/2: finite and above 0, also as the f32 that kernels take, and that is
/// returned.
float check_scale(const char* op, const char* argument, double scale, int64_t dim);

/// Checks that heads_q is a multiple of heads_kv (0 and 0 included).
void check_groups(const char* op, const char* argument, int64_t heads_q, int64_t heads_kv);

/// Checks that no two elements of `output` share memory, and that it shares none with any of `others`.
void check_output(const char* op, const char* argument, const ConstTensor& output,
                  std::initializer_list<const ConstTensor*> others);

/// Checks that `workspace` has room for `bytes`.
void check_workspace(const char* op, const Workspace& workspace, int64_t bytes);

/// The view as kernels take it; an undefined view becomes a null operand.
Operand operand(const ConstTensor& t);

}  // namespace subquad::core
