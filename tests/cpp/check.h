/// A test program in one header: TEST, CHECK, CHECK_NEAR, CHECK_THROWS, SKIP, for_each_isa, passes_in_child, and
/// main().
///
/// `./test_name` runs every case, `./test_name part` those whose name contains `part`, `./test_name --list` names them.
/// Exit status: 0 passed, 1 failed, 2 nothing selected, 77 everything skipped.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "subquad/cpu.h"

namespace check {

struct Case {
  const char* name;
  void (*body)();
};

struct Skip {
  std::string reason;
};

static inline std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}

/// Checks may run on any thread, so failures are counted atomically.
static inline std::atomic<int>& failures() {
  static std::atomic<int> count{0};
  return count;
}

/// Where the running case is, for messages: the row of kernels inside for_each_isa, else empty.
static inline std::string& context() {
  static std::string text;
  return text;
}

static inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::printf("%s:%d: %s%s%s\n", file, line, context().c_str(), context().empty() ? "" : ": ", what.c_str());
}

/// Written as !(difference <= tolerance) so that NaN fails; equal infinities pass.
static inline void check_near(const char* file, int line, const char* text, double a, double b, double tolerance) {
  if (a == b || std::fabs(a - b) <= tolerance) return;
  char values[120];
  std::snprintf(values, sizeof values, ": %.9g against %.9g, tolerance %.3g", a, b, tolerance);
  fail(file, line, text + std::string(values));
}

template <class Error, class F>
static void check_throws(const char* file, int line, const char* text, const std::string& part, F&& body) {
  try {
    body();
  } catch (const std::exception& error) {
    const std::exception* thrown = &error;
    const std::string message = thrown->what();
    if (!dynamic_cast<const Error*>(thrown))
      fail(file, line, std::string(text) + ": throws another type, \"" + message + "\"");
    else if (message.find(part) == std::string::npos)
      fail(file, line, std::string(text) + ": the message is \"" + message + "\", without \"" + part + "\"");
    return;
  }
  fail(file, line, std::string(text) + ": throws nothing");
}

/// Calls body(name) with every row of kernels that this machine can run forced in turn, then puts the old row back.
/// SUBQUAD_TEST_ISA names the only row to run.
template <class F>
static void for_each_isa(F&& body) {
  struct Restore {
    std::string row = subquad::cpu::isa();
    ~Restore() { subquad::cpu::set_isa(row), context().clear(); }
  } restore;
  const char* only = std::getenv("SUBQUAD_TEST_ISA");
  int rows = 0;
  for (const std::string& name : subquad::cpu::available()) {
    if (only && name != only) continue;
    ++rows;
    subquad::cpu::set_isa(name);
    context() = name;
    if (subquad::cpu::isa() != name) fail(__FILE__, __LINE__, "the row in use is " + subquad::cpu::isa());
    body(name);
  }
  if (rows == 0) fail(__FILE__, __LINE__, std::string("SUBQUAD_TEST_ISA: no row is called ") + only);
}

/// True where the row in use is the emulated CUDA backend: a thousand times slower, and narrower, than the others.
static inline bool emulated() { return subquad::cpu::isa() == "cuda_emulated"; }

static inline bool& in_child() {
  static bool value = false;
  return value;
}

/// Runs body() in a forked child that exits in the ordinary way; true if every check in it held. A child that hangs is
/// ended by its alarm.
template <class F>
static bool passes_in_child(F&& body) {
  const pid_t child = fork();
  if (child == 0) {
    in_child() = true;
    alarm(60);
    const int before = failures();
    body();
    std::exit(failures() == before ? 0 : 1);
  }
  int status = -1;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

enum class Outcome { passed, failed, skipped };

static inline Outcome run_case(const Case& test) {
  const int before = failures();
  try {
    test.body();
  } catch (const Skip& skip) {
    std::printf("SKIP %s: %s\n", test.name, skip.reason.c_str());
    if (failures() == before) return Outcome::skipped;
  } catch (const std::exception& error) {
    fail(test.name, 0, std::string("exception: ") + error.what());
  }
  if (failures() == before) return Outcome::passed;
  std::printf("FAIL %s\n", test.name);
  return Outcome::failed;
}

static inline int run_cases(int argc, char** argv) {
  // Line by line, so that neither a crash nor a forked child loses or repeats what was printed.
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  const std::string filter = argc > 1 ? argv[1] : "";
  int count[3] = {};
  for (const Case& test : cases()) {
    if (filter == "--list") {
      std::puts(test.name);
    } else if (std::strstr(test.name, filter.c_str())) {
      ++count[int(run_case(test))];
    }
  }
  if (filter == "--list") return 0;
  const int passed = count[int(Outcome::passed)], failed = count[int(Outcome::failed)];
  const int skipped = count[int(Outcome::skipped)];
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  if (failed) return 1;
  return passed ? 0 : skipped ? 77 : 2;
}

struct Registration {
  Registration(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

}  // namespace check

/// LeakSanitizer asks this. In a forked child it would take what the parent's other threads own for leaks.
extern "C" int __lsan_is_turned_off() { return check::in_child(); }

#define TEST(name)                                                       \
  static void test_##name();                                             \
  static const check::Registration register_##name(#name, &test_##name); \
  static void test_##name()
#define CHECK(...) ((__VA_ARGS__) ? void() : check::fail(__FILE__, __LINE__, "CHECK(" #__VA_ARGS__ ")"))
#define CHECK_NEAR(a, b, tolerance) check::check_near(__FILE__, __LINE__, "CHECK_NEAR(" #a ", " #b ")", a, b, tolerance)
/// The expression throws an `Error` (any std::exception without _AS) whose message contains `part`.
#define CHECK_THROWS_AS(Error, expression, part) \
  check::check_throws<Error>(__FILE__, __LINE__, "CHECK_THROWS(" #expression ")", part, [&] { (void)(expression); })
#define CHECK_THROWS(expression, part) CHECK_THROWS_AS(std::exception, expression, part)
#define SKIP(reason) \
  throw check::Skip { reason }

int main(int argc, char** argv) { return check::run_cases(argc, argv); }
