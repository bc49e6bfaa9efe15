#include "core/registry.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "core/rows.h"
#include "cpu/detect.h"
#include "subquad/cpu.h"

namespace subquad {
namespace {

std::atomic<const Row*> row_in_use{nullptr};
std::atomic<const core::DeviceBackend*> cuda_backend{nullptr};

bool runs(const Row& row) { return row.emulated || cpu::can_run(row.name); }

std::string names_of(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Row& find_row(const char* argument, const std::string& name) {
  for (const Row& row : kRows)
    if (name == row.name && runs(row)) return row;
  core::invalid("cpu", argument, "one of " + names_of(cpu::available()), "\"" + name + "\"");
}

const Row& default_row() {
  if (const char* forced = std::getenv("SUBQUAD_ISA"))
    if (*forced) return find_row("SUBQUAD_ISA", forced);
  const Row* best = &kRows[0];
  for (const Row& row : kRows)
    if (!row.emulated && runs(row)) best = &row;
  return *best;
}

const Row& current_row() {
  const Row* row = row_in_use.load(std::memory_order_acquire);
  if (!row) {
    // Two threads may both find the default; they find the same one. A row set meanwhile stays.
    const Row* found = &default_row();
    if (row_in_use.compare_exchange_strong(row, found)) row = found;
  }
  return *row;
}

}  // namespace

namespace cpu {

std::vector<std::string> compiled() {
  std::vector<std::string> names;
  for (const Row& row : kRows) names.push_back(row.name);
  return names;
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Row& row : kRows)
    if (runs(row)) names.push_back(row.name);
  return names;
}

std::string isa() { return current_row().name; }

void set_isa(const std::string& name) { row_in_use.store(&find_row("isa", name), std::memory_order_release); }

}  // namespace cpu

Queue Queue::cpu(int num_threads) {
  return {{DeviceType::cpu, 0}, nullptr, num_threads > 0 ? num_threads : default_num_threads()};
}

Queue Queue::cuda(int device_index, void* stream) { return {{DeviceType::cuda, device_index}, stream, 1}; }

namespace core {

void register_cuda_backend(const DeviceBackend& backend) { cuda_backend.store(&backend, std::memory_order_release); }

const DeviceBackend& cuda_backend_of(const char* op, const Queue& queue) {
  const DeviceBackend* backend = cuda_backend.load(std::memory_order_acquire);
  if (!backend) unsupported(op, "this build has no backend for " + to_string(queue.device) + " arrays");
  return *backend;
}

const Kernels& kernels(const char* op, const Queue& queue) {
  return queue.device.type == DeviceType::cpu ? current_row().table() : cuda_backend_of(op, queue).table();
}

DeviceScope::DeviceScope(const char* op, const Queue& queue) {
  if (queue.device.type == DeviceType::cpu) return;
  const DeviceBackend& backend = cuda_backend_of(op, queue);
  if (const char* status = backend.enter(queue.device.index, &before_)) throw device_error(op, status);
  leave_ = backend.leave;
}

DeviceScope::~DeviceScope() {
  if (leave_) leave_(before_);
}

CheckedValues::CheckedValues(const char* op, const Queue& queue, const ConstTensor& array) {
  if (array.numel() == 0) return;
  if (queue.device.type == DeviceType::cpu) {
    view = array;
    return;
  }
  static const bool wanted = [] {
    const char* text = std::getenv("SUBQUAD_CHECK");
    return text && !std::strcmp(text, "1");
  }();
  if (!wanted) return;
  int64_t low = 0, high = 1;
  for (int i = 0; i < array.rank; ++i) {
    const int64_t reach = (array.shape[i] - 1) * array.stride[i];
    (reach < 0 ? low : high) += reach;
  }
  const int64_t size = dtype_bytes(array.dtype);
  copy_.resize(size_t((high - low) * size));
  const DeviceScope device(op, queue);
  const void* first = static_cast<const char*>(array.data) + low * size;
  if (const char* status = cuda_backend_of(op, queue).read(queue, copy_.data(), first, int64_t(copy_.size())))
    throw device_error(op, status);
  view = array;
  view.data = copy_.data() - low * size;
}

DeviceError device_error(const char* op, const char* status) {
  return DeviceError("[" + std::string(op) + "] " + status);
}

std::string backend_name(const Queue& queue) {
  return queue.device.type == DeviceType::cpu ? "cpu (" + cpu::isa() + ")" : to_string(queue.device);
}

}  // namespace core
}  // namespace subquad
