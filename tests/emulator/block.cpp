#include "emulator/block.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulator {
namespace {

// Masks that one block used are likely used by the next.
constexpr size_t kMeetingsKept = 4;

bool same(const Site& a, const Site& b) {
  if (!a.what || !b.what) return a.what == b.what;
  return a.line == b.line && !std::strcmp(a.what, b.what) && !std::strcmp(a.file, b.file);
}

/// One line for every place where threads are.
void print_places() {
  std::vector<const Thread*> firsts;
  std::vector<int> counts;
  for (const Thread& thread : running->threads) {
    if (thread.ended) continue;
    size_t i = 0;
    while (i < firsts.size() && !same(firsts[i]->site, thread.site)) ++i;
    if (i == firsts.size()) firsts.push_back(&thread), counts.push_back(0);
    ++counts[i];
  }
  for (size_t i = 0; i < firsts.size(); ++i) {
    const Thread& t = *firsts[i];
    std::fprintf(stderr, "  %d threads, first thread %u (warp %u, lane %u)", counts[i], t.flat, t.warp, t.lane);
    if (t.site.what)
      std::fprintf(stderr, ": %s at %s:%d\n", t.site.what, t.site.file, t.site.line);
    else
      std::fprintf(stderr, ": in no barrier\n");
  }
}

/// A release lets threads before the running one go on: all, or those of its warp.
void released_block() { running->first_runnable = 0; }

void released_warp() {
  const unsigned place = running->place[running->self->flat];
  const unsigned first = place >= kLanes - 1 ? place - (kLanes - 1) : 0;
  if (first < running->first_runnable) running->first_runnable = first;
}

bool runnable(const Thread& thread) {
  return !thread.ended && !(thread.waits_for && thread.waits_for->generation == thread.generation);
}

Thread* next_runnable() {
  Block& block = *running;
  for (unsigned& place = block.first_runnable; place < block.order.size(); ++place)
    if (runnable(block.threads[block.order[place]])) return &block.threads[block.order[place]];
  return nullptr;
}

void check_stack() {
  if (!running->stacks.intact(running->self->flat)) die("a thread used more than its stack");
}

void wait(const Meeting& meeting, unsigned generation) {
  Thread& self = *running->self;
  check_stack();
  self.waits_for = &meeting;
  self.generation = generation;
  Thread* next = next_runnable();
  if (!next) die("deadlock: not every thread that a barrier or warp function names gets there");
  if (next != &self) {
    running->self = next;
    switch_fibers(self.fiber, next->fiber, false);
  }
  self.waits_for = nullptr;
  self.site = {};
}

/// The last one to arrive releases the others; the generation that the caller takes part in.
void arrive(Meeting& meeting, const Site& site) {
  if (meeting.arrived++ == 0) meeting.site = site;
  running->self->site = site;
}

void release(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.generation;
  running->self->site = {};
}

void end_thread() {
  Block& block = *running;
  Thread& self = *block.self;
  check_stack();
  self.ended = true;
  block.warps[self.warp].ended |= 1u << self.lane;
  --block.live;
  // Threads that have returned do not hold up a barrier.
  if (block.live && block.barrier.arrived == block.live) release(block.barrier), released_block();
  Thread* next = block.live ? next_runnable() : nullptr;
  if (!next && block.live) die("deadlock: the threads left wait for one that has returned");
  if (next) block.self = next;
  switch_fibers(self.fiber, next ? next->fiber : block.starter, true);
}

void run_thread() {
  enter_fiber(running->self->fiber, running->starter);
  running->kernel(running->arguments);
  end_thread();
}

void begin_thread(Block& block, unsigned i) {
  Thread& thread = block.threads[i];
  const dim3& extent = block.extent;
  thread.flat = i, thread.lane = i % kLanes, thread.warp = i / kLanes;
  thread.index = {i % extent.x, i / extent.x % extent.y, i / extent.x / extent.y};
  thread.ended = false;
  thread.waits_for = nullptr;
  thread.site = {};
  thread.copies.clear();
  thread.copy_group = 0;
  prepare_fiber(thread.fiber, block.stacks.lowest(i), Stacks::bytes(), run_thread);
}

}  // namespace

void die(const char* message) {
  const uint3 b = running->index;
  std::fprintf(stderr, "emulator: %s; block (%u, %u, %u)\n", message, b.x, b.y, b.z);
  const Thread& self = *running->self;
  std::fprintf(stderr, "  the running thread: %u (warp %u, lane %u)\n", self.flat, self.warp, self.lane);
  print_places();
  std::abort();
}

unsigned lanes_of(unsigned mask) {
  const unsigned left = unsigned(running->threads.size()) - running->self->warp * kLanes;
  return left >= kLanes ? mask : mask & ((1u << left) - 1);
}

Votes wait_for_block(bool vote, Site site) {
  Block& block = *running;
  Meeting& barrier = block.barrier;
  const unsigned generation = barrier.generation;
  Votes& votes = block.votes[generation & 1];
  if (barrier.arrived == 0) votes = {};
  votes.yes += vote;
  ++votes.all;
  arrive(barrier, site);
  if (!same(barrier.site, site)) die("divergence: threads of a block wait in different barriers");
  if (barrier.arrived == block.live) {
    release(barrier);
    released_block();
  } else {
    wait(barrier, generation);
  }
  return votes;
}

WarpMeeting::Words& wait_for_warp(unsigned mask, const uint64_t* words, int count, Site site,
                                  void (*combine)(WarpMeeting::Words&, unsigned)) {
  Thread& self = *running->self;
  Warp& warp = running->warps[self.warp];
  self.site = site;
  if (!(mask >> self.lane & 1)) die("a lane calls a warp function with a mask that does not name it");
  mask = lanes_of(mask);
  if (mask & warp.ended) die("a warp function names a lane that has returned");
  auto meeting = warp.meetings.begin();
  while (meeting != warp.meetings.end() && meeting->mask != mask) ++meeting;
  if (meeting == warp.meetings.end()) {
    meeting = warp.meetings.emplace(meeting);
    meeting->mask = mask;
  }
  arrive(*meeting, site);
  if (std::strcmp(meeting->site.what, site.what)) die("lanes of one mask call different warp functions");
  const unsigned generation = meeting->generation;
  WarpMeeting::Words& table = meeting->words[generation & 1];
  for (int i = 0; i < count; ++i) table[self.lane][i] = words[i];
  if (meeting->arrived == unsigned(__builtin_popcount(mask))) {
    if (combine) combine(table, mask);
    release(*meeting);
    released_warp();
  } else {
    wait(*meeting, generation);
  }
  return table;
}

void run_block() {
  Block& block = *running;
  const unsigned count = unsigned(block.threads.size());
  block.live = count;
  block.barrier = {};
  for (Warp& warp : block.warps) {
    warp.ended = 0;
    if (warp.meetings.size() > kMeetingsKept) warp.meetings.clear();
  }
  // NaN in every float format: shared memory starts undefined.
  if (block.shared_bytes) std::memset(block.shared, 0xff, block.shared_bytes);
  for (unsigned i = 0; i < count; ++i) begin_thread(block, i);
  block.first_runnable = 0;
  block.starter.stack = nullptr;
  block.self = &block.threads[block.order[0]];
  switch_fibers(block.starter, block.self->fiber, false);
}

}  // namespace emulator
