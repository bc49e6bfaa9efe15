#include <thread>

#include "emulator/test_support.h"

using namespace emulator;

namespace {

constexpr unsigned kAll = 0xffffffffu;

/// The value of `lane`, any function that no permutation leaves alone.
constexpr int value_of(int lane) { return lane * lane + 3 * lane; }

}  // namespace

TEST(threads_know_their_place) {
  under_every_schedule([] {
    const dim3 grid(5, 3, 2), block(4, 3, 5);
    std::vector<int> visits(5 * 3 * 2 * 4 * 3 * 5);
    CHECK(!launch(
        +[](int* visits) {
          const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
          const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
          atomicAdd(&visits[b * 60 + t], int(b * 60 + t + 1));
        },
        grid, block, 0, visits.data()));
    for (size_t i = 0; i < visits.size(); ++i) CHECK(visits[i] == int(i) + 1);
  });
}

TEST(grids_are_large) {
  const unsigned blocks = 70000;
  std::vector<unsigned char> visits(blocks);
  CHECK(!launch(+[](unsigned char* visits) { ++visits[blockIdx.x]; }, dim3(blocks), dim3(1), 0, visits.data()));
  for (const unsigned char count : visits) CHECK(count == 1);
}

TEST(a_barrier_separates_what_lies_before_and_behind) {
  under_every_schedule([] {
    const unsigned threads = 100, blocks = 6;
    std::vector<unsigned> out(threads * blocks);
    CHECK(!launch(
        +[](unsigned* out) {
          unsigned* shared = reinterpret_cast<unsigned*>(dyn_smem());
          for (unsigned round = 0; round < 5; ++round) {
            shared[threadIdx.x] = threadIdx.x + round + blockIdx.x;
            __syncthreads();
            out[blockIdx.x * blockDim.x + threadIdx.x] += shared[blockDim.x - 1 - threadIdx.x];
            __syncthreads();
          }
        },
        dim3(blocks), dim3(threads), threads * 4, out.data()));
    for (unsigned i = 0; i < out.size(); ++i) CHECK(out[i] == 5 * (threads - 1 - i % threads) + 10 + 5 * (i / threads));
  });
}

TEST(barriers_count_votes_and_do_not_wait_for_threads_that_returned) {
  under_every_schedule([] {
    int out[3][70] = {};
    CHECK(!launch(
        +[](int(*out)[70]) {
          if (threadIdx.x % 7 == 3) return;
          out[0][threadIdx.x] = __syncthreads_count(threadIdx.x < 14);
          if (threadIdx.x >= 35) return;
          out[1][threadIdx.x] = __syncthreads_and(threadIdx.x < 35) + 2 * __syncthreads_and(threadIdx.x > 0);
          out[2][threadIdx.x] = __syncthreads_or(threadIdx.x == 34) + 2 * __syncthreads_or(threadIdx.x == 3);
        },
        dim3(1), dim3(70), 0, out));
    for (int t = 0; t < 70; ++t) {
      const bool first = t % 7 != 3, second = first && t < 35;
      CHECK(out[0][t] == (first ? 12 : 0) && out[1][t] == (second ? 1 : 0) && out[2][t] == (second ? 1 : 0));
    }
  });
}

TEST(shuffles_of_groups) {
  under_every_schedule([] {
    for (int width = 1; width <= 32; width *= 2)
      for (int step = 0; step < 32; step += 1 + step / 3) {
        int out[4][64];
        CHECK(!launch(
            +[](int(*out)[64], int width, int step) {
              const int t = int(threadIdx.x), lane = t % 32;
              out[0][t] = __shfl_sync(kAll, value_of(lane), step, width);
              out[1][t] = __shfl_up_sync(kAll, value_of(lane), unsigned(step), width);
              out[2][t] = __shfl_down_sync(kAll, value_of(lane), unsigned(step), width);
              out[3][t] = __shfl_xor_sync(kAll, value_of(lane), step, width);
            },
            dim3(1), dim3(64), 0, out, width, step));
        for (int t = 0; t < 64; ++t) {
          const int lane = t % 32, first = lane / width * width, end = first + width;
          CHECK(out[0][t] == value_of(first + step % width));
          CHECK(out[1][t] == value_of(lane - step < first ? lane : lane - step));
          CHECK(out[2][t] == value_of(lane + step >= end ? lane : lane + step));
          CHECK(out[3][t] == value_of((lane ^ step) >= end ? lane : lane ^ step));
        }
      }
  });
}

TEST(shuffles_of_wide_values) {
  double out[32];
  long long sums[32];
  CHECK(!launch(
      +[](double* out, long long* sums) {
        const int lane = int(threadIdx.x);
        out[lane] = __shfl_xor_sync(kAll, 1.0 / (lane + 1), 5);
        long long sum = lane * 0x100000001ll;
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAll, sum, unsigned(step));
        sums[lane] = __shfl_sync(kAll, sum, 0);
      },
      dim3(1), dim3(32), 0, out, sums));
  for (int lane = 0; lane < 32; ++lane) CHECK(out[lane] == 1.0 / ((lane ^ 5) + 1) && sums[lane] == 496 * 0x100000001ll);
}

TEST(votes_and_reductions_over_the_lanes_of_a_mask) {
  under_every_schedule([] {
    // Three masks in one warp, and a last warp of 8 lanes, named by a full mask.
    unsigned out[10][40];
    CHECK(!launch(
        +[](unsigned(*out)[40]) {
          const unsigned t = threadIdx.x, lane = t % 32;
          const unsigned mask = t >= 32         ? kAll
                                : lane % 3 == 0 ? 0x49249249u
                                : lane % 3 == 1 ? 0x92492492u
                                                : 0x24924924u;
          const int x = int(lane % 5) - 2;
          out[0][t] = __ballot_sync(mask, lane % 2);
          out[1][t] = unsigned(__any_sync(mask, lane == 7)) + 2 * unsigned(__all_sync(mask, lane != 7));
          out[2][t] = __match_any_sync(mask, lane % 5);
          out[3][t] = __match_any_sync(mask, (lane % 4) * 0x100000000ull);
          out[4][t] = unsigned(__reduce_add_sync(mask, x));
          out[5][t] = unsigned(__reduce_min_sync(mask, x)), out[6][t] = unsigned(__reduce_max_sync(mask, x));
          out[7][t] = __reduce_max_sync(mask, unsigned(x));
          out[8][t] = __reduce_or_sync(mask, 1u << lane), out[9][t] = __reduce_and_sync(mask, ~(1u << lane));
          __syncwarp(mask);
        },
        dim3(1), dim3(40), 0, out));
    for (unsigned t = 0; t < 40; ++t) {
      unsigned expected[10] = {0, 2, 0, 0, 0, 2, unsigned(-2), 0, 0, kAll};
      for (unsigned o = t / 32 * 32; o < (t < 32 ? 32 : 40); ++o) {
        if (t < 32 && o % 3 != t % 3) continue;
        const unsigned lane = o % 32, bit = 1u << lane;
        const int x = int(lane % 5) - 2;
        if (lane % 2) expected[0] |= bit;
        if (lane == 7) expected[1] = 1;
        if (lane % 5 == t % 32 % 5) expected[2] |= bit;
        if (lane % 4 == t % 32 % 4) expected[3] |= bit;
        expected[4] += unsigned(x);
        expected[5] = unsigned(std::min(int(expected[5]), x)), expected[6] = unsigned(std::max(int(expected[6]), x));
        expected[7] = std::max(expected[7], unsigned(x));
        expected[8] |= bit, expected[9] &= ~bit;
      }
      for (int i = 0; i < 10; ++i) CHECK(out[i][t] == expected[i]);
    }
  });
}

TEST(warps_run_apart_between_barriers) {
  // What a missing barrier lets through: under every schedule somebody reads what nobody has written.
  for (const char* order : {"fwd", "rev", "rand:1", "rand:2"}) {
    const UnderSchedule schedule(order, "late");
    float out[256];
    CHECK(!launch(
        +[](float* out) {
          float* shared = reinterpret_cast<float*>(dyn_smem());
          shared[threadIdx.x] = 1;
          out[threadIdx.x] = shared[255 - threadIdx.x];
        },
        dim3(1), dim3(256), 1024, out));
    int undefined = 0;
    for (const float x : out) undefined += std::isnan(x);
    CHECK(undefined == 128);
  }
}

TEST(shared_memory_starts_undefined_in_every_block) {
  under_every_schedule([] {
    float out[5];
    CHECK(!launch(
        +[](float* out) {
          float* shared = reinterpret_cast<float*>(dyn_smem());
          out[blockIdx.x] = shared[24];
          shared[24] = 1;
        },
        dim3(5), dim3(1), 100, out));
    for (const float x : out) CHECK(std::isnan(x));
  });
}

TEST(atomics_of_blocks_on_several_threads) {
  const UnderSchedule schedule("rand:5", "late", "4");
  struct Totals {
    int sum = 5, least = 100, greatest = -100, wrapped = 2147483647;
    unsigned bits = 0, kept = kAll, odd = 0;
    unsigned long long wide = 0, last = 0;
    float real = 0;
    int taken = -1, winners = 0;
  } totals;
  CHECK(!launch(
      +[](Totals* t) {
        const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
        atomicAdd(&t->sum, i), atomicSub(&t->sum, 2 * i), atomicAdd(&t->wrapped, 1);
        atomicMin(&t->least, -i), atomicMax(&t->greatest, i);
        atomicOr(&t->bits, 1u << i % 32), atomicAnd(&t->kept, ~(1u << i % 16)), atomicXor(&t->odd, unsigned(i));
        atomicAdd(&t->wide, 1ull << 33), atomicExch(&t->last, 7ull), atomicAdd(&t->real, 0.5f);
        if (atomicCAS(&t->taken, -1, i) == -1) atomicAdd(&t->winners, 1);
      },
      dim3(64), dim3(64), 0, &totals));
  CHECK(totals.sum == 5 - 4096 * 4095 / 2 && totals.least == -4095 && totals.greatest == 4095);
  CHECK(totals.wrapped == -2147483647 - 1 + 4095 && totals.bits == kAll && totals.kept == 0xffff0000u);
  CHECK(totals.odd == 0 && totals.wide == 4096ull << 33 && totals.last == 7 && totals.real == 2048);
  CHECK(totals.winners == 1 && totals.taken >= 0 && totals.taken < 4096);
}

TEST(several_threads_launch_at_once) {
  const UnderSchedule schedule("rand:3", "rand", "2");
  std::vector<std::vector<int>> out(4, std::vector<int>(64 * 20));
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&out, i] {
      for (int round = 0; round < 10; ++round)
        CHECK(!launch(
            +[](int* out, int add) {
              int* shared = reinterpret_cast<int*>(dyn_smem());
              shared[threadIdx.x] = add;
              __syncthreads();
              out[blockIdx.x * 64 + threadIdx.x] += shared[63 - threadIdx.x];
            },
            dim3(20), dim3(64), 256, out[size_t(i)].data(), i));
    });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 4; ++i)
    for (const int x : out[size_t(i)]) CHECK(x == 10 * i);
}

TEST(blocks_run_in_the_order_of_the_schedule_each_once) {
  for (const unsigned blocks : {1u, 2u, 60u, 61u}) {
    std::vector<std::vector<unsigned>> orders;
    for (const char* order : {"fwd", "rev", "rand:1", "rand:2"}) {
      const UnderSchedule schedule(order, "late");
      std::vector<unsigned> out(blocks + 1);
      CHECK(!launch(+[](unsigned* out) { out[1 + out[0]++] = blockIdx.x; }, dim3(blocks), dim3(1), 0, out.data()));
      out.erase(out.begin());
      orders.push_back(out);
      std::vector<bool> seen(blocks);
      for (const unsigned b : out) CHECK(b < blocks && !seen[b]), seen[b] = true;
    }
    CHECK(orders[0].front() == 0 && orders[0].back() == blocks - 1);
    CHECK(orders[1].front() == blocks - 1 && orders[1].back() == 0);
    if (blocks >= 60) CHECK(orders[2] != orders[3] && orders[2] != orders[0] && orders[3] != orders[0]);
  }
}

TEST(launches_that_the_hardware_refuses) {
  const auto status = [](dim3 grid, dim3 block, size_t bytes) {
    const char* words = launch(+[] {}, grid, block, bytes);
    return std::string(words ? words : "");
  };
  const std::string shape = "invalid configuration argument";
  CHECK(status(dim3(1), dim3(0), 0) == shape && status(dim3(1), dim3(1025), 0) == shape);
  CHECK(status(dim3(1), dim3(32, 33), 0) == shape && status(dim3(1), dim3(1, 1, 65), 0) == shape);
  CHECK(status(dim3(0), dim3(1), 0) == shape && status(dim3(1, 0), dim3(1), 0) == shape);
  CHECK(status(dim3(1, 65536), dim3(1), 0) == shape && status(dim3(1, 1, 65536), dim3(1), 0) == shape);
  CHECK(status(dim3(0x80000000u), dim3(1), 0) == shape);
  CHECK(status(dim3(1), dim3(1), 227 * 1024 + 1) == "invalid argument");
  CHECK(status(dim3(1, 1, 2), dim3(1, 16, 64), 227 * 1024).empty());
  const UnderSchedule wrong("random", "late");
  CHECK(status(dim3(1), dim3(1), 0) == "EMULATOR_ORDER: expected fwd, rev or rand:SEED");
}

TEST(deadlocks_end_the_program_with_the_places) {
  std::string words = last_words([] {
    launch(
        +[](int) {
          if (threadIdx.x >= 40)
            __syncthreads({"kernel.cuh", 7});
          else
            __shfl_sync(threadIdx.x < 32 ? kAll : 0x1ffu, 1, 0);
        },
        dim3(3), dim3(64), 0, 0);
  });
  CHECK(has(words, {"deadlock", "block (0, 0, 0)", "24 threads, first thread 40 (warp 1, lane 8)",
                    "__syncthreads at kernel.cuh:7\n", "8 threads, first thread 32", "__shfl_sync at ",
                    "test_emulator.cpp:"}));
  words = last_words([] {
    launch(
        +[](int) {
          if (threadIdx.x != 31) __syncwarp(kAll, {"kernel.cuh", 8});
        },
        dim3(1), dim3(32), 0, 0);
  });
  CHECK(has(words, {"the threads left wait for one that has returned", "31 threads", "__syncwarp at kernel.cuh:8\n"}));
}

TEST(divergence_ends_the_program_with_the_places) {
  std::string words = last_words([] {
    launch(
        +[](int) {
          if (threadIdx.x < 32) __syncthreads({"kernel.cuh", 7});
          if (threadIdx.x >= 32) __syncthreads({"kernel.cuh", 8});
        },
        dim3(1), dim3(64), 0, 0);
  });
  CHECK(has(words, {"divergence", "32 threads, first thread 0 (warp 0, lane 0): __syncthreads at kernel.cuh:7\n",
                    "__syncthreads at kernel.cuh:8\n"}));
  words = last_words([] {
    launch(
        +[](int) {
          if (threadIdx.x < 31) __ballot_sync(kAll, 1);
          if (threadIdx.x == 31) __any_sync(kAll, 1);
        },
        dim3(1), dim3(32), 0, 0);
  });
  CHECK(has(words, {"different warp functions", "__ballot_sync at ", "__any_sync at "}));
}

TEST(misused_warp_functions_end_the_program) {
  const auto words = [](void (*kernel)(int)) { return last_words([=] { launch(kernel, dim3(1), dim3(32), 0, 0); }); };
  CHECK(has(words([](int) {
              if (threadIdx.x) __syncwarp(1);
            }),
            {"a mask that does not name it", "lane 1"}));
  CHECK(has(words([](int) {
              if (threadIdx.x == 0) return;
              __syncwarp(0xff);
            }),
            {"names a lane that has returned"}));
  CHECK(has(words([](int) {
              if (threadIdx.x < 8) __shfl_sync(0xff, 1, 9);
            }),
            {"reads a lane outside its mask"}));
  CHECK(has(words([](int) { __shfl_sync(kAll, 1, 0, 12); }), {"a power of two"}));
}

namespace {

/// Uses about a kilobyte of stack for each level.
__attribute__((noinline)) int descend(int depth) {
  volatile char memory[1024];
  for (char volatile& byte : memory) byte = char(depth);
  return depth ? descend(depth - 1) + memory[5] : (__syncthreads(), 0);
}

}  // namespace

TEST(memory_errors_end_the_program) {
  int out[2] = {};
  // Deep, but no deeper than allowed.
  CHECK(!launch(+[](int* out) { out[threadIdx.x] = descend(100) | 1; }, dim3(1), dim3(2), 0, out));
  CHECK(out[0] == out[1] && out[0] != 0);
  const std::string shared = last_words([] { launch(+[](int) { dyn_smem()[100] = 1; }, dim3(1), dim3(2), 100, 0); });
#if defined(EMULATOR_ADDRESS_SANITIZER)
  CHECK(has(shared, {"heap-buffer-overflow", "100-byte region"}));
#else
  CHECK(has(shared, {"behind the end of the dynamic shared memory"}));
  const std::string stack = last_words([] { launch(+[](int) { descend(600); }, dim3(1), dim3(2), 0, 0); });
  CHECK(has(stack, {"more than its stack"}));
#endif
}
