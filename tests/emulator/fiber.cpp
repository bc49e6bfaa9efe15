#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(EMULATOR_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

/// Frames on the heap, which find uses of returned frames, would be set up anew for every thread of every block.
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0"; }
#endif

namespace emulator {

#if !defined(EMULATOR_USES_UCONTEXT)
/// Saves the registers that a call keeps on the running stack and goes on with another one.
extern "C" void emulator_switch_stacks(void** saved, void* next);
asm(R"(
.text
.globl emulator_switch_stacks
.hidden emulator_switch_stacks
.type emulator_switch_stacks,@function
emulator_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch_stacks,.-emulator_switch_stacks
)");
#endif

void prepare_fiber(Fiber& fiber, char* stack, size_t bytes, void (*body)()) {
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  fiber.fake_stack = nullptr;
#if defined(EMULATOR_ADDRESS_SANITIZER)
  // The frames that never returned, when the stack was last used, left their marks.
  __asan_unpoison_memory_region(stack + bytes - 4096, 4096);
#endif
#if defined(EMULATOR_USES_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
#else
  // As if null had called body from a stack aligned to 16 bytes; below, six registers to restore.
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

void enter_fiber(Fiber& own, Fiber& starter) {
#if defined(EMULATOR_ADDRESS_SANITIZER)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(own.fake_stack, &stack, &bytes);
  if (!starter.stack) starter.stack = stack, starter.stack_bytes = bytes;
#else
  (void)own, (void)starter;
#endif
}

void switch_fibers(Fiber& from, Fiber& to, bool ended) {
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(ended ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#else
  (void)ended;
#endif
#if defined(EMULATOR_USES_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  emulator_switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

namespace {

constexpr int kMark = 0xa5;
constexpr size_t kMarkBytes = 64;

}  // namespace

void Stacks::reserve(unsigned count) {
  if (count <= count_) return;
  release();
  // One more, so that the lowest stack has something below it too.
  const size_t bytes = (count + 1) * kStride;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulator: no memory for the stacks of a block");
    std::abort();
  }
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (unsigned i = 0; i < count; ++i) std::memset(lowest(i) - kMarkBytes, kMark, kMarkBytes);
}

bool Stacks::intact(unsigned i) const {
  uint64_t expected, found[kMarkBytes / 8], difference = 0;
  std::memset(&expected, kMark, sizeof expected);
  std::memcpy(found, lowest(i) - kMarkBytes, kMarkBytes);
  for (const uint64_t word : found) difference |= word ^ expected;
  return difference == 0;
}

void Stacks::release() {
  if (memory_) munmap(memory_, (count_ + 1) * kStride);
  memory_ = nullptr;
  count_ = 0;
}

}  // namespace emulator
