#include "emulator/launch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>

namespace emulator {
namespace {

enum class Order { forward, reverse, random };

struct Schedule {
  Order order = Order::forward;
  Landing landing = Landing::late;
  uint64_t seed = 0;
  unsigned os_threads = 1;
};

/// Null, or what is wrong with the environment.
const char* read_schedule(Schedule& schedule) {
  const auto value = [](const char* name, const char* otherwise) {
    const char* text = std::getenv(name);
    return std::string(text && *text ? text : otherwise);
  };
  const std::string order = value("EMULATOR_ORDER", "fwd"), landing = value("EMULATOR_ASYNC", "late");
  if (order == "rev")
    schedule.order = Order::reverse;
  else if (order.compare(0, 5, "rand:") == 0)
    schedule.order = Order::random, schedule.seed = std::strtoull(order.c_str() + 5, nullptr, 10);
  else if (order != "fwd")
    return "EMULATOR_ORDER: expected fwd, rev or rand:SEED";
  if (landing == "early" || landing == "rand")
    schedule.landing = landing == "rand" ? Landing::random : Landing::early;
  else if (landing != "late")
    return "EMULATOR_ASYNC: expected late, early or rand";
  const int threads = std::atoi(value("EMULATOR_THREADS", "1").c_str());
  if (threads < 1 || threads > 256) return "EMULATOR_THREADS: expected 1 to 256";
  schedule.os_threads = unsigned(threads);
  return nullptr;
}

/// What the hardware refuses, in the words of its driver.
const char* refusal(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
                    threads && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && threads <= 1024;
  if (!fits) return "invalid configuration argument";
  return launch.shared_bytes > 227 * 1024 ? "invalid argument" : nullptr;
}

/// Shared memory that ends where the kernel said. Writes behind its end are found by AddressSanitizer, or afterwards.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes + kTail + !bytes)) std::abort();
    data_ = static_cast<unsigned char*>(memory);
    if (kTail) std::memset(data_ + bytes, 0xff, kTail);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { std::free(data_); }

  unsigned char* data() const { return data_; }

  void check() const {
    for (size_t i = 0; i < kTail; ++i)
      if (data_[bytes_ + i] != 0xff) die("a thread wrote behind the end of the dynamic shared memory");
  }

 private:
#if defined(EMULATOR_ADDRESS_SANITIZER)
  static constexpr size_t kTail = 0;
#else
  static constexpr size_t kTail = 256;
#endif
  size_t bytes_;
  unsigned char* data_;
};

template <class T>
void shuffle(std::minstd_rand& random, T* first, unsigned count) {
  for (unsigned i = count; i > 1; --i) std::swap(first[i - 1], first[(random() >> 8) % i]);
}

/// The lanes of a warp stay together, as the scheduler relies on.
void choose_order(Block& block, Order order) {
  const unsigned count = unsigned(block.threads.size()), warps = (count + kLanes - 1) / kLanes;
  std::vector<unsigned> warp_order(warps);
  std::iota(warp_order.begin(), warp_order.end(), 0u);
  if (order == Order::random) shuffle(block.random, warp_order.data(), warps);
  block.order.clear();
  for (const unsigned warp : warp_order) {
    const size_t first = block.order.size();
    for (unsigned i = warp * kLanes; i < count && i < (warp + 1) * kLanes; ++i) block.order.push_back(i);
    if (order == Order::random) shuffle(block.random, &block.order[first], unsigned(block.order.size() - first));
  }
  if (order == Order::reverse) std::reverse(block.order.begin(), block.order.end());
  block.place.resize(count);
  for (unsigned i = 0; i < count; ++i) block.place[block.order[i]] = i;
}

/// The blocks of a grid in an order of the schedule: first, first + step, ... modulo their number.
struct BlockOrder {
  uint64_t count, first, step;

  BlockOrder(uint64_t blocks, const Schedule& schedule) : count(blocks), first(0), step(1) {
    if (schedule.order == Order::reverse) first = step = blocks - 1;
    if (schedule.order != Order::random) return;
    std::minstd_rand random{std::minstd_rand::result_type(schedule.seed * 7919 + 1)};
    first = random() % blocks;
    do step = random() % 65536 + 1;
    while (std::gcd(step, blocks) != 1);
  }
  uint64_t operator[](uint64_t i) const { return (first + i * step) % count; }
};

/// What an OS thread does of a launch. Its block is kept, because its stacks are costly.
void run_blocks(const Launch& launch, const Schedule& schedule, const BlockOrder& blocks, std::atomic<uint64_t>& next) {
  static thread_local Block block;
  const SharedMemory shared(launch.shared_bytes);
  const unsigned count = launch.block.x * launch.block.y * launch.block.z;
  block.grid = launch.grid, block.extent = launch.block;
  block.threads.resize(count);
  block.warps.resize((count + kLanes - 1) / kLanes);
  block.stacks.reserve(count);
  block.shared = shared.data(), block.shared_bytes = launch.shared_bytes;
  block.landing = schedule.landing;
  block.kernel = launch.kernel, block.arguments = launch.arguments;
  running = &block;
  bool ordered = false;
  for (uint64_t i; (i = next.fetch_add(1)) < blocks.count;) {
    const uint64_t b = blocks[i], rows = uint64_t(launch.grid.x) * launch.grid.y;
    block.index = {unsigned(b % launch.grid.x), unsigned(b / launch.grid.x % launch.grid.y), unsigned(b / rows)};
    // From the number of the block, so that the OS thread that runs it does not matter.
    block.random.seed(std::minstd_rand::result_type((schedule.seed * 1000003 + b) * 0x9e3779b97f4a7c15u >> 33));
    if (!ordered || schedule.order == Order::random) choose_order(block, schedule.order);
    ordered = true;
    run_block();
    shared.check();
  }
  running = nullptr;
}

}  // namespace

const char* run(const Launch& launch) {
  Schedule schedule;
  if (const char* status = read_schedule(schedule)) return status;
  if (const char* status = refusal(launch)) return status;
  const BlockOrder blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z, schedule);
  std::atomic<uint64_t> next{0};
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < schedule.os_threads && i < blocks.count; ++i)
    helpers.emplace_back([&] { run_blocks(launch, schedule, blocks, next); });
  run_blocks(launch, schedule, blocks, next);
  for (std::thread& helper : helpers) helper.join();
  return nullptr;
}

}  // namespace emulator
