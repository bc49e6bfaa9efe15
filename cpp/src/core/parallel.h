/// The one way to use several threads.
#pragma once
#include <cstdint>

#include "subquad/queue.h"

namespace subquad::core {

/// Calls task(context, index, worker) once for each index in [0, tasks), in any order, on up to `num_threads` threads;
/// `worker` in [0, num_threads) is different for tasks that run at the same time, so it may index scratch memory.
/// Tasks must not throw. Nested calls run serially as worker 0. Any thread may call at any time, in a forked child too.
void parallel_run(int num_threads, int64_t tasks, void (*task)(void* context, int64_t index, int worker),
                  void* context);

template <class F>
static inline void parallel_for(const Queue& queue, int64_t tasks, F&& f) {
  struct Local {
    static void run(void* context, int64_t index, int worker) { (*static_cast<F*>(context))(index, worker); }
  };
  parallel_run(queue.num_threads, tasks, &Local::run, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace subquad::core
