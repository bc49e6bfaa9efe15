#include "core/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>

#include "core/check.h"

namespace subquad {
namespace {

/// What we use of GCC's OpenMP runtime when some other library has loaded one, as torch does; nothing links it.
struct OpenMp {
  void (*parallel)(void (*entry)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*max_threads)();
};

template <class Function>
void look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
}

/// Null if there is none yet: torch may be imported after subquad. Asking dlopen costs 20 us while the answer is no, so
/// it is asked again only after a library has been loaded.
const OpenMp* loaded_openmp() {
  static OpenMp functions;
  static std::atomic<const OpenMp*> found{nullptr};
  static std::atomic<unsigned long long> loads_seen{0};
  static std::mutex asking;
  if (const OpenMp* known = found.load(std::memory_order_acquire)) return known;
  unsigned long long loads = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        *static_cast<unsigned long long*>(out) = info->dlpi_adds;
        return 1;
      },
      &loads);
  if (loads == loads_seen.load(std::memory_order_relaxed)) return nullptr;
  // Tried, not taken: whoever holds it may wait for the loader, and the loader for a constructor that called us.
  std::unique_lock<std::mutex> lock(asking, std::try_to_lock);
  if (!lock || found.load(std::memory_order_relaxed)) return found.load(std::memory_order_acquire);
  loads_seen.store(loads, std::memory_order_relaxed);
  void* library = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_NOW);
  if (!library) return nullptr;
  look_up(library, "GOMP_parallel", functions.parallel);
  look_up(library, "omp_get_max_threads", functions.max_threads);
  if (functions.parallel && functions.max_threads) found.store(&functions, std::memory_order_release);
  return found.load(std::memory_order_relaxed);
}

int affinity_cpus() {
  for (int capacity = 1024; capacity <= 1 << 20; capacity *= 2) {
    cpu_set_t* set = CPU_ALLOC(capacity);
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    const int cpus = set && sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (cpus > 0) return cpus;
  }
  return 1;
}

}  // namespace

int default_num_threads() {
  const char* own = std::getenv("SUBQUAD_NUM_THREADS");
  if (own && *own) {
    int count = 0;
    const char* end = own + std::strlen(own);
    const std::from_chars_result parsed = std::from_chars(own, end, count);
    if (parsed.ec != std::errc() || parsed.ptr != end || count < 1)
      core::invalid("cpu", "SUBQUAD_NUM_THREADS", "a positive integer", "\"" + std::string(own) + "\"");
    return count;
  }
  if (const OpenMp* openmp = loaded_openmp()) return std::max(1, openmp->max_threads());
  // A list gives one number per nesting level; the first is ours. What is no number is ignored, as OpenMP does.
  const char* openmp_list = std::getenv("OMP_NUM_THREADS");
  const long count = openmp_list ? std::strtol(openmp_list, nullptr, 10) : 0;
  if (count > 0 && count <= std::numeric_limits<int>::max()) return int(count);
  return affinity_cpus();
}

namespace core {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
constexpr bool kThreadSanitizer = __has_feature(thread_sanitizer);
#else
constexpr bool kThreadSanitizer = false;
#endif

/// How long a thread waits at full speed before it sleeps: as long as waking it would take. Regions of one call follow
/// each other faster; another library's threads that want the core next wait no longer than this.
constexpr std::chrono::microseconds kSpin{50};

/// More threads than this only take turns, and a wrong number must not use up the machine.
int thread_limit() {
  static const int limit = std::max(64, affinity_cpus());
  return limit;
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <class Condition>
bool spin_until(Condition&& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i, pause())
      if (condition()) return true;
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

/// True while this thread runs tasks of a region.
thread_local bool inside_region = false;

/// One call of parallel_run, on the caller's stack.
struct Region {
  void (*task)(void*, int64_t, int);
  void* context;
  int64_t tasks, chunk;
  int num_threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> entered{0};

  void work(int worker) {
    inside_region = true;
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < tasks;)
      for (int64_t i = begin; i < std::min(begin + chunk, tasks); ++i) task(context, i, worker);
    inside_region = false;
  }

  /// Entry of an OpenMP team, which may be larger than the number of threads asked for.
  static void enter(void* self) {
    Region& region = *static_cast<Region*>(self);
    const int worker = region.entered.fetch_add(1, std::memory_order_relaxed);
    if (worker < region.num_threads) region.work(worker);
  }
};

/// Threads of our own, which sleep between regions. One region at a time.
class Pool {
 public:
  /// False, and nothing done, if another region is running.
  bool run(Region& region);

 private:
  static void* loop(void* self);
  void grow(int workers);
  void open(Region& region);
  void close();

  std::atomic<bool> busy_{false};
  int workers_ = 0;  // touched by the thread that holds busy_

  std::mutex mutex_;  // guards region_ and seats_, and every change of epoch_ and inside_
  std::condition_variable opened_, emptied_;
  std::atomic<uint64_t> epoch_{0};  // number of regions opened
  Region* region_ = nullptr;
  int seats_ = 0;               // workers that may still join the region
  std::atomic<int> inside_{0};  // workers that have joined and not left
};

bool Pool::run(Region& region) {
  if (busy_.exchange(true, std::memory_order_acquire)) return false;
  grow(region.num_threads - 1);
  open(region);
  region.work(0);
  close();
  busy_.store(false, std::memory_order_release);
  return true;
}

void Pool::grow(int workers) {
  for (; workers_ < workers; ++workers_) {
    pthread_t thread;
    // A system out of threads makes the region slower, not wrong.
    if (pthread_create(&thread, nullptr, &loop, this) != 0) return;
    pthread_detach(thread);
  }
}

void Pool::open(Region& region) {
  const int seats = region.num_threads - 1;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    region_ = &region;
    seats_ = seats;
    epoch_.fetch_add(1, std::memory_order_release);
  }
  if (seats >= workers_) return opened_.notify_all();
  for (int i = 0; i < seats; ++i) opened_.notify_one();
}

void Pool::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    region_ = nullptr;
  }
  if (spin_until([this] { return inside_.load(std::memory_order_acquire) == 0; })) return;
  std::unique_lock<std::mutex> lock(mutex_);
  emptied_.wait(lock, [this] { return inside_.load() == 0; });
}

void* Pool::loop(void* self) {
  Pool& pool = *static_cast<Pool*>(self);
  for (uint64_t seen = 0;;) {
    spin_until([&] { return pool.epoch_.load(std::memory_order_acquire) != seen; });
    std::unique_lock<std::mutex> lock(pool.mutex_);
    pool.opened_.wait(lock, [&] { return pool.epoch_.load() != seen; });
    seen = pool.epoch_.load();
    if (!pool.region_ || pool.seats_ == 0) continue;
    const int worker = pool.seats_--;
    Region& region = *pool.region_;
    ++pool.inside_;
    lock.unlock();
    region.work(worker);
    lock.lock();
    if (--pool.inside_ == 0) pool.emptied_.notify_one();
  }
}

// Never destroyed: its workers sleep on it while the process exits.
alignas(Pool) char pool_storage[sizeof(Pool)];

Pool& pool() {
  static Pool* const made = new (pool_storage) Pool;
  return *made;
}

std::atomic<bool> forked{false};

/// A forked child has none of its parent's threads, and an OpenMP runtime waits for them forever. Registered when the
/// library is loaded, before any region has run.
const bool fork_is_handled = [] {
  pool();
  return pthread_atfork(nullptr, nullptr, [] {
           new (pool_storage) Pool;
           forked = true;
         }) == 0;
}();

}  // namespace

void parallel_run(int num_threads, int64_t tasks, void (*task)(void*, int64_t, int), void* context) {
  const int threads = int(std::min<int64_t>({num_threads, tasks, thread_limit()}));
  if (threads > 1 && !inside_region) {
    // Single indices balance best; many small tasks share the cost of the counter.
    Region region{task, context, tasks, std::max<int64_t>(1, tasks / (int64_t(threads) * 64)), threads};
    const bool own = kThreadSanitizer || forked.load(std::memory_order_relaxed);
    if (const OpenMp* openmp = own ? nullptr : loaded_openmp()) {
      // The whole team, though some find no work: a smaller one ends threads that torch's next region starts again.
      const int team = std::max(threads, openmp->max_threads());
      return openmp->parallel(&Region::enter, &region, unsigned(team), 0);
    }
    if (pool().run(region)) return;
  }
  for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
}

}  // namespace core
}  // namespace subquad
