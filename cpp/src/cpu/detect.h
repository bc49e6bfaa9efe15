/// Which rows of kernels this machine can run. The only reader of CPUID.
#pragma once

namespace subquad::cpu {

/// True if every feature that the row was compiled with is there and the operating system saves its registers.
bool can_run(const char* row);

}  // namespace subquad::cpu
