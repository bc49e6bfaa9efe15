/// Stacks that one OS thread switches between: each thread of a block is such a fiber.
#pragma once
#include <cstddef>
#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_USES_UCONTEXT 1
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ADDRESS_SANITIZER 1
#endif
#endif

namespace emulator {

struct Fiber {
#if defined(EMULATOR_USES_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // its lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

/// The first switch to `fiber` calls body(), which never returns.
void prepare_fiber(Fiber& fiber, char* stack, size_t bytes, void (*body)());

/// body() calls this first: `starter` is the fiber of the OS thread, which started the first of all.
void enter_fiber(Fiber& own, Fiber& starter);

/// Returns when somebody switches back to `from`; never, if `from` has ended.
void switch_fibers(Fiber& from, Fiber& to, bool ended);

/// The stacks of an OS thread's fibers, kept from launch to launch; pages that no fiber touches cost nothing.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(unsigned count);
  char* lowest(unsigned i) const { return memory_ + (i + 1) * kStride + kGap; }
  static constexpr size_t bytes() { return kStride - kGap; }

  /// False if fiber i used more than its stack; a little more hurts no other fiber.
  bool intact(unsigned i) const;

 private:
  // Big register arrays lie on the stack, several times larger without optimisation or with a sanitizer.
  static constexpr size_t kStride = 512 * 1024, kGap = 8192;
  void release();
  char* memory_ = nullptr;
  unsigned count_ = 0;
};

}  // namespace emulator
