#include "core/parallel.h"

#include <sched.h>

#include <cstdlib>
#include <thread>

namespace subquad {

int default_num_threads() {
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
  return 1;
}

namespace core {

void parallel_run(int num_threads, int64_t tasks, void (*task)(void*, int64_t, int), void* context) {
  (void)num_threads;
  for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
}

}  // namespace core
}  // namespace subquad
