#include "device/launch.cuh"
#include "random.cuh"
#include "table.h"

namespace subquad::cuda {
namespace {

const char* run(const Queue& queue, const RandomArgs& args, void*) {
  const int64_t counters = args.leading * args.rows * ceil_div(args.cols, kRandomColumns), most = 0x7fffffff;
  if (counters == 0) return nullptr;
  const int64_t blocks = ceil_div(counters, kRandomThreads);
  const auto kernel = args.distribution == Distribution::uniform  ? random_kernel<Distribution::uniform>
                      : args.distribution == Distribution::normal ? random_kernel<Distribution::normal>
                                                                  : random_kernel<Distribution::sign>;
  return launch(queue, kernel, dim3(unsigned(blocks < most ? blocks : most)), dim3(kRandomThreads), 0, args);
}

const char* supports(const RandomArgs&) { return nullptr; }

int64_t workspace_bytes(const Queue&, const RandomArgs&) { return 0; }

}  // namespace

const Slot<RandomArgs> random_slot = {supports, workspace_bytes, run};

}  // namespace subquad::cuda
