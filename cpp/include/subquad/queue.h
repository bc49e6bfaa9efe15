/// Where work runs: a device with a stream, or the CPU with a number of threads.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define SUBQUAD_API
#else
#define SUBQUAD_API __attribute__((visibility("default")))
#endif

namespace subquad {

enum class DeviceType : uint8_t { cpu, cuda };

struct Device {
  DeviceType type;
  int32_t index;
};

/// Work on the CPU has finished when a call returns; work on a CUDA queue is ordered on `stream`.
struct Queue {
  Device device;
  void* stream;         ///< cudaStream_t; null on the CPU
  int32_t num_threads;  ///< CPU threads a call may use, at least 1

  /// The CPU with `num_threads` threads; 0 asks for the default of default_num_threads().
  SUBQUAD_API static Queue cpu(int num_threads = 0);
  SUBQUAD_API static Queue cuda(int device_index, void* stream);
};

/// SUBQUAD_NUM_THREADS, else the team size of an OpenMP runtime already in the process (so that
/// torch.set_num_threads counts), else OMP_NUM_THREADS, else the CPUs this process may run on.
SUBQUAD_API int default_num_threads();

}  // namespace subquad
