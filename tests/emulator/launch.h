/// Launches. The environment chooses a schedule; a kernel without races gives the same result under all of them:
///   EMULATOR_ORDER=fwd|rev|rand:SEED  the order of blocks, warps and lanes
///   EMULATOR_ASYNC=late|early|rand    asynchronous copies land when waited for, when issued, or either
///   EMULATOR_THREADS=n                blocks run on n OS threads
#pragma once
#include <type_traits>

#include "emulator/block.h"

namespace emulator {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*kernel)(const void* arguments);
  const void* arguments;
};

/// Returns when the grid has run. Null, or what is wrong with the launch. May be called from several threads.
const char* run(const Launch& launch);

/// Arguments become the kernel's parameters here, as in a launch on a device.
template <class... P>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, std::common_type_t<P>... args) {
  const auto call = [&] { kernel(args...); };
  using Call = decltype(call);
  return run({grid, block, shared_bytes, [](const void* c) { (*static_cast<Call*>(c))(); }, &call});
}

}  // namespace emulator
