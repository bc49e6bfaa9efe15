/// CUDA devices. These functions live in the library subquad::cuda, which a build with SUBQUAD_CUDA=ON has.
#pragma once
#include <string>
#include <vector>

#include "subquad/queue.h"

namespace subquad {

/// Makes calls on CUDA queues possible: hands the table of CUDA kernels to the core. A program that links subquad::cuda
/// calls it once before the first of them; further calls do nothing. Touches no device and needs no driver.
SUBQUAD_API void register_cuda();

namespace cuda {

struct DeviceInfo {
  std::string name;
  int32_t major, minor;  ///< compute capability
  int32_t multiprocessors;
  int64_t memory_bytes;
};

/// The devices that the driver shows; empty where there is no driver or no device. Creates no context.
SUBQUAD_API std::vector<DeviceInfo> devices();

/// Why devices() is empty, in the words of the CUDA run time; empty if it is not.
SUBQUAD_API std::string why_none();

/// Version of the CUDA run time that is linked, for example "13.0".
SUBQUAD_API std::string runtime_version();

/// Compute capabilities that have machine code in this build, for example "80-real;90a-real;90-virtual".
SUBQUAD_API std::string architectures();

}  // namespace cuda
}  // namespace subquad
