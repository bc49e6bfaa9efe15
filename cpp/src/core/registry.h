/// From a queue to the table of kernels that serves it.
#pragma once
#include <string>
#include <vector>

#include "core/check.h"
#include "core/kernels.h"

namespace subquad::core {

/// What the core has to know of devices other than the CPU. Strings are null, or what the device said went wrong.
struct DeviceBackend {
  const Kernels& (*table)();
  /// Makes `index` the device of the calling thread and tells which it was before.
  const char* (*enter)(int32_t index, int32_t* before);
  void (*leave)(int32_t before);
  /// Waits for the queue and copies `bytes` from the device.
  const char* (*read)(const Queue& queue, void* host, const void* device, int64_t bytes);
};

/// Makes `backend`, which lives as long as the program, serve CUDA queues.
void register_cuda_backend(const DeviceBackend& backend);

/// @throws Unsupported if this build has none.
const DeviceBackend& cuda_backend_of(const char* op, const Queue& queue);

/// The queue's device is the calling thread's device as long as this lives.
class DeviceScope {
 public:
  DeviceScope(const char* op, const Queue& queue);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  void (*leave_)(int32_t) = nullptr;
  int32_t before_ = 0;
};

/// Values for checks that read them. On the CPU that is the array itself. On a device nothing (`view` is undefined), or
/// with SUBQUAD_CHECK=1 a copy, for which the call waits.
struct CheckedValues {
  CheckedValues(const char* op, const Queue& queue, const ConstTensor& array);
  ConstTensor view;

 private:
  std::vector<char> copy_;
};

DeviceError device_error(const char* op, const char* status);

/// The table for the queue's device: the CPU row in use, or the registered CUDA table.
/// @throws Unsupported if the device has no backend in this build.
const Kernels& kernels(const char* op, const Queue& queue);

/// Name of the table that kernels() returns, for messages.
std::string backend_name(const Queue& queue);

/// A slot chosen for one call, after the kernel agreed to the arguments.
template <class Args>
const Slot<Args>& choose(const char* op, const Queue& queue, Slot<Args> Kernels::* slot, const Args& args) {
  const Slot<Args>& chosen = kernels(op, queue).*slot;
  if (!chosen.run) unsupported(op, "no kernel on " + backend_name(queue));
  if (const char* reason = chosen.supports(args))
    unsupported(op, "no kernel on " + backend_name(queue) + " for " + reason);
  return chosen;
}

template <class Args>
int64_t workspace_bytes(const char* op, const Queue& queue, Slot<Args> Kernels::* slot, const Args& args) {
  return choose(op, queue, slot, args).workspace_bytes(queue, args);
}

/// Checks the workspace and runs the kernel. `args` have been validated.
template <class Args>
void launch(const char* op, const Queue& queue, Slot<Args> Kernels::* slot, const Args& args,
            const Workspace& workspace) {
  const Slot<Args>& chosen = choose(op, queue, slot, args);
  check_workspace(op, workspace, chosen.workspace_bytes(queue, args));
  const DeviceScope device(op, queue);
  if (const char* status = chosen.run(queue, args, workspace.data)) throw device_error(op, status);
}

}  // namespace subquad::core
