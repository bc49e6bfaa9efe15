/// Which instruction set the CPU kernels use. Picked once, on first use; visible; can be forced.
#pragma once
#include <string>
#include <vector>

#include "subquad/queue.h"

namespace subquad::cpu {

/// Names of the kernel rows this machine can run, slowest first, for example
/// {"x86_64", "x86_64_v3", "x86_64_v4"}.
SUBQUAD_API std::vector<std::string> available();

/// Names of the kernel rows this build contains, whether or not this machine can run them.
SUBQUAD_API std::vector<std::string> compiled();

/// The row in use: the environment variable SUBQUAD_ISA if set, else the last of available().
/// @throws std::invalid_argument if SUBQUAD_ISA names a row that is unknown or that this machine cannot run.
SUBQUAD_API std::string isa();

/// Forces a row for all later calls of this process.
/// @throws std::invalid_argument if the name is unknown or this machine cannot run it.
SUBQUAD_API void set_isa(const std::string& name);

}  // namespace subquad::cpu
