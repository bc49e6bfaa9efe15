#include <dlfcn.h>
#include <sched.h>

#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "core/parallel.h"

using subquad::default_num_threads;
using subquad::Queue;
using subquad::core::parallel_for;

// A child of a process with threads may start threads of its own.
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }
extern "C" __attribute__((weak)) void __tsan_init();

namespace {

bool under_thread_sanitizer() { return &__tsan_init != nullptr; }

struct Openmp {
  void* library = nullptr;
  int (*in_parallel)() = nullptr;
};

/// Known only after the case that loads it; the cases before that run on the library's own threads.
Openmp openmp;

/// One region: every index once, workers in range and distinct at any moment.
void check_region(int threads, int64_t tasks) {
  std::vector<std::atomic<int>> times(tasks);
  std::vector<std::atomic<int>> busy(threads);
  parallel_for(Queue::cpu(threads), tasks, [&](int64_t index, int worker) {
    CHECK(0 <= worker && worker < threads);
    CHECK(++busy[worker] == 1);
    if (index % 7 == 0) std::this_thread::yield();
    ++times[index];
    --busy[worker];
  });
  for (const auto& count : times) CHECK(count == 1);
}

/// Two tasks that wait for each other: they pass only if two threads take part.
void check_two_threads_meet() {
  std::atomic<int> arrived{0};
  parallel_for(Queue::cpu(2), 2, [&](int64_t, int) {
    ++arrived;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (arrived < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    CHECK(arrived == 2);
    CHECK(!openmp.in_parallel || openmp.in_parallel() == !under_thread_sanitizer());
  });
}

void check_all_shapes() {
  for (int threads = 1; threads <= 8; ++threads)
    for (int64_t tasks : {0, 1, 2, 3, 7, 8, 9, 100, 5000}) check_region(threads, tasks);
}

void check_nested() {
  std::vector<std::atomic<int>> times(12 * 34);
  parallel_for(Queue::cpu(3), 12, [&](int64_t outer, int) {
    const std::thread::id self = std::this_thread::get_id();
    parallel_for(Queue::cpu(3), 34, [&](int64_t inner, int worker) {
      CHECK(worker == 0);
      CHECK(std::this_thread::get_id() == self);
      ++times[outer * 34 + inner];
    });
  });
  for (const auto& count : times) CHECK(count == 1);
}

void check_several_callers() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([caller] {
      for (int repeat = 0; repeat < 50; ++repeat) check_region(1 + (caller + repeat) % 4, 1 + repeat * 3);
    });
  for (std::thread& caller : callers) caller.join();
}

void check_forked_child() {
  check_region(3, 50);
  CHECK(check::passes_in_child([] {
    openmp.in_parallel = nullptr;
    check_two_threads_meet();
    check_region(4, 100);
    CHECK(default_num_threads() >= 1);
    CHECK(check::passes_in_child([] { check_two_threads_meet(); }));
  }));
  check_region(3, 50);
}

/// Sets or, with a null value, removes a variable of the environment until the end of the scope.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name), had_(std::getenv(name) != nullptr) {
    if (had_) before_ = std::getenv(name);
    assign(value);
  }
  ~Variable() { assign(had_ ? before_.c_str() : nullptr); }

 private:
  void assign(const char* value) { value ? setenv(name_, value, 1) : unsetenv(name_); }

  const char* name_;
  bool had_;
  std::string before_;
};

}  // namespace

TEST(own_variable_sets_the_number_of_threads) {
  const Variable openmp_variable("OMP_NUM_THREADS", "5");
  {
    const Variable own("SUBQUAD_NUM_THREADS", "3");
    CHECK(default_num_threads() == 3);
    CHECK(Queue::cpu().num_threads == 3);
    CHECK(Queue::cpu(2).num_threads == 2);
  }
  for (const char* wrong : {"0", "-1", "two", "2x", " 2", "2 ", "1.5", "99999999999"}) {
    const Variable own("SUBQUAD_NUM_THREADS", wrong);
    CHECK_THROWS_AS(std::invalid_argument, default_num_threads(),
                    std::string("[cpu] SUBQUAD_NUM_THREADS: expected a positive integer, got \"") + wrong + "\"");
  }
  const Variable empty("SUBQUAD_NUM_THREADS", "");
  CHECK(default_num_threads() == 5);
}

TEST(openmp_variable_is_next) {
  const Variable own("SUBQUAD_NUM_THREADS", nullptr);
  for (const char* text : {"3", "3,2", " 3 , 1"}) {
    const Variable openmp_variable("OMP_NUM_THREADS", text);
    CHECK(default_num_threads() == 3);
  }
}

TEST(affinity_is_last) {
  const Variable own("SUBQUAD_NUM_THREADS", nullptr);
  cpu_set_t before;
  if (sched_getaffinity(0, sizeof before, &before) != 0) SKIP("more than 1024 CPUs");
  for (const char* text : {static_cast<const char*>(nullptr), "", "0", "-2", "many"}) {
    const Variable openmp_variable("OMP_NUM_THREADS", text);
    CHECK(default_num_threads() == CPU_COUNT(&before));
  }
  const Variable openmp_variable("OMP_NUM_THREADS", nullptr);
  CHECK(check::passes_in_child([&] {
    int first = 0;
    while (!CPU_ISSET(first, &before)) ++first;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(default_num_threads() == 1);
  }));
}

TEST(every_index_once) { check_all_shapes(); }

TEST(absurd_number_of_threads) { check_region(100000, 20000); }

TEST(threads_take_part) {
  for (int repeat = 0; repeat < 20; ++repeat) check_two_threads_meet();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  check_two_threads_meet();
}

TEST(nested_calls_are_serial) { check_nested(); }

TEST(several_callers_at_once) { check_several_callers(); }

TEST(results_of_workers_are_visible) {
  std::vector<int64_t> squares(1000);
  for (int repeat = 0; repeat < 200; ++repeat) {
    parallel_for(Queue::cpu(4), 1000, [&](int64_t index, int) { squares[index] = index * repeat; });
    CHECK(std::accumulate(squares.begin(), squares.end(), int64_t(0)) == int64_t(499500) * repeat);
  }
}

TEST(forked_child) { check_forked_child(); }

TEST(fork_while_another_thread_works) {
  if (under_thread_sanitizer()) SKIP("a child forked from several threads cannot use ThreadSanitizer");
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) check_region(2, 30);
  });
  for (int repeat = 0; repeat < 10; ++repeat) CHECK(check::passes_in_child([] { check_two_threads_meet(); }));
  stop = true;
  other.join();
}

// Last: from here on the process has an OpenMP runtime, and regions run on its team.
TEST(team_of_a_loaded_openmp) {
  openmp.library = dlopen("libgomp.so.1", RTLD_NOW);
  if (!openmp.library) SKIP("libgomp.so.1 is not installed");
  const auto set_num_threads = reinterpret_cast<void (*)(int)>(dlsym(openmp.library, "omp_set_num_threads"));
  const auto set_max_levels = reinterpret_cast<void (*)(int)>(dlsym(openmp.library, "omp_set_max_active_levels"));
  openmp.in_parallel = reinterpret_cast<int (*)()>(dlsym(openmp.library, "omp_in_parallel"));
  const Variable own("SUBQUAD_NUM_THREADS", nullptr);
  for (int threads : {3, 2}) {
    set_num_threads(threads);
    set_max_levels(threads);
    CHECK(default_num_threads() == threads);
    check_two_threads_meet();
    check_all_shapes();
    check_nested();
  }
  check_several_callers();
  check_forked_child();
}
