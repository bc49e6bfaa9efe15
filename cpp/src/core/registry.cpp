#include "core/registry.h"

#include <atomic>
#include <cstdlib>
#include <iterator>

#include "core/rows.h"
#include "cpu/detect.h"
#include "subquad/cpu.h"

namespace subquad {
namespace {

std::atomic<const Row*> row_in_use{nullptr};

std::string names_of(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Row& find_row(const char* argument, const std::string& name) {
  for (const Row& row : kRows)
    if (name == row.name && cpu::can_run(row.name)) return row;
  core::invalid("cpu", argument, "one of " + names_of(cpu::available()), "\"" + name + "\"");
}

const Row& default_row() {
  if (const char* forced = std::getenv("SUBQUAD_ISA"))
    if (*forced) return find_row("SUBQUAD_ISA", forced);
  const Row* best = &kRows[0];
  for (const Row& row : kRows)
    if (cpu::can_run(row.name)) best = &row;
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
    if (can_run(row.name)) names.push_back(row.name);
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

const Kernels& kernels(const char* op, const Queue& queue) {
  if (queue.device.type != DeviceType::cpu)
    unsupported(op, "this build has no backend for " + to_string(queue.device) + " arrays");
  return current_row().table();
}

std::string backend_name(const Queue& queue) {
  return queue.device.type == DeviceType::cpu ? "cpu (" + cpu::isa() + ")" : to_string(queue.device);
}

}  // namespace core
}  // namespace subquad
