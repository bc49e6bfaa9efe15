/// A block being run: its threads, whom they wait for, and whose turn it is.
///
/// A thread runs until it waits for others, then the first thread in the order that can run goes on: warps run as far
/// apart as barriers allow, which is what shows that one is missing.
#pragma once
#include <deque>
#include <random>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/language.h"

namespace emulator {

constexpr unsigned kLanes = 32;

/// What a thread waits in, and where the kernel says so.
struct Site {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
};

/// Threads that wait for each other. The last one to arrive begins a new generation, and all go on.
struct Meeting {
  unsigned generation = 0, arrived = 0;
  Site site;
};

/// Lanes of a warp that show each other up to five words. Two tables in turn: when a lane arrives for the next
/// generation but one, every lane has read this one.
struct WarpMeeting : Meeting {
  using Words = uint64_t[kLanes][5];
  unsigned mask = 0;
  Words words[2];
};

struct Warp {
  std::deque<WarpMeeting> meetings;  // one for every mask in use
  unsigned ended = 0;                // lanes whose kernel has returned
};

/// An asynchronous copy that has not landed; `bytes` of 16, the rest is zero.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  unsigned flat = 0, lane = 0, warp = 0;
  bool ended = true;
  const Meeting* waits_for = nullptr;  // as long as its generation is `generation`
  unsigned generation = 0;
  Site site;
  std::vector<PendingCopy> copies;
  int copy_group = 0;
};

struct Votes {
  unsigned yes = 0, all = 0;
};

enum class Landing { late, early, random };

struct Block {
  dim3 grid, extent;
  uint3 index{};
  unsigned live = 0;  // threads whose kernel has not returned
  std::vector<Thread> threads;
  std::vector<unsigned> order, place;  // order[place[i]] = i; the lanes of a warp are adjacent
  unsigned first_runnable = 0;         // no thread before this place can run
  Thread* self = nullptr;
  Fiber starter;
  Stacks stacks;
  Meeting barrier;
  Votes votes[2];
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Landing landing = Landing::late;
  std::minstd_rand random;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
};

/// The block that the calling OS thread runs.
inline thread_local Block* running = nullptr;

/// Ends the program with a message that says where every thread of the block is.
[[noreturn]] void die(const char* message);

/// Waits for all threads of the block that have not returned; the votes of those that arrived.
Votes wait_for_block(bool vote, Site site);

/// Waits for the lanes of `mask` (those that the block has) and returns the words of all. The last lane to arrive calls
/// combine(words, mask), if there is one, which may replace the words by results.
WarpMeeting::Words& wait_for_warp(unsigned mask, const uint64_t* words, int count, Site site,
                                  void (*combine)(WarpMeeting::Words& words, unsigned mask) = nullptr);

/// The lanes of `mask` that the block has: its last warp may be short.
unsigned lanes_of(unsigned mask);

/// Runs block running->index to its end.
void run_block();

/// Dynamic shared memory.
inline unsigned char* dyn_smem() { return running->shared; }

}  // namespace emulator

#define threadIdx (::emulator::running->self->index)
#define blockIdx (::emulator::running->index)
#define blockDim (::emulator::running->extent)
#define gridDim (::emulator::running->grid)
constexpr int warpSize = ::emulator::kLanes;
