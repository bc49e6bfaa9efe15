/// From a queue to the table of kernels that serves it.
#pragma once
#include <string>

#include "core/check.h"
#include "core/kernels.h"

namespace subquad::core {

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
  if (const char* status = chosen.run(queue, args, workspace.data))
    throw DeviceError("[" + std::string(op) + "] " + status);
}

}  // namespace subquad::core
