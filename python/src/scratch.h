/// Scratch memory for calls on the CPU.
#pragma once
#include <cstdint>
#include <new>

#include "huge_pages.h"

namespace subquad::python {

/// One block of scratch memory. Each thread keeps its last one, up to 256 MiB, for its next call: the system takes longer
/// to hand out fresh pages than a linear-cost operator takes to use them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { operator delete(data_, kAlignment); }

  /// Memory for `bytes`, from the block that this thread kept if that is large enough.
  static Scratch* acquire(int64_t bytes) {
    Scratch*& kept = kept_by_this_thread().block;
    Scratch* block = kept;
    kept = nullptr;
    if (block && block->bytes_ >= bytes) return block;
    delete block;
    block = new Scratch;
    block->data_ = operator new(size_t(bytes), kAlignment);
    block->bytes_ = bytes;
    prefer_huge_pages(block->data_, bytes);
    return block;
  }

  static void release(Scratch* block) {
    Scratch*& kept = kept_by_this_thread().block;
    if (block->bytes_ > kMostKept || (kept && kept->bytes_ >= block->bytes_)) {
      delete block;
    } else {
      delete kept;
      kept = block;
    }
  }

  /// Gives back what this thread kept.
  static void forget() {
    Scratch*& kept = kept_by_this_thread().block;
    delete kept;
    kept = nullptr;
  }

  void* data() const { return data_; }

 private:
  static constexpr int64_t kMostKept = int64_t(256) << 20;
  static constexpr std::align_val_t kAlignment{64};

  struct Kept {
    Scratch* block = nullptr;
    ~Kept() { delete block; }
  };
  static Kept& kept_by_this_thread() {
    static thread_local Kept kept;
    return kept;
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace subquad::python
