/// What the emulator's tests share: schedules, and launches that are expected to end the program.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include <initializer_list>
#include <string>

#include "check.h"
#include "emulator/cuda.h"

namespace emulator {

/// Sets the schedule as long as it lives.
class UnderSchedule {
 public:
  UnderSchedule(const char* order, const char* landing, const char* threads = "1") {
    const char* values[] = {order, landing, threads};
    for (int i = 0; i < 3; ++i) {
      const char* before = std::getenv(kNames[i]);
      before_[i] = before ? before : "";
      setenv(kNames[i], values[i], 1);
    }
  }
  UnderSchedule(const UnderSchedule&) = delete;
  UnderSchedule& operator=(const UnderSchedule&) = delete;
  ~UnderSchedule() {
    for (int i = 0; i < 3; ++i) setenv(kNames[i], before_[i].c_str(), 1);
  }

 private:
  static constexpr const char* kNames[] = {"EMULATOR_ORDER", "EMULATOR_ASYNC", "EMULATOR_THREADS"};
  std::string before_[3];
};

template <class F>
void under_every_schedule(F&& body) {
  const char* schedules[][3] = {{"fwd", "late", "1"},    {"fwd", "early", "1"},   {"rev", "late", "1"},
                                {"rand:1", "rand", "1"}, {"rand:2", "rand", "1"}, {"rand:3", "late", "4"}};
  for (const auto& s : schedules) {
    const UnderSchedule schedule(s[0], s[1], s[2]);
    check::context() = std::string(s[0]) + ", " + s[1] + ", " + s[2] + " threads";
    body();
  }
  check::context().clear();
}

/// What body(), in a forked child that it must end, writes to stderr; empty if it returns.
template <class F>
std::string last_words(F&& body) {
  int ends[2];
  if (pipe(ends)) return "";
  const pid_t child = fork();
  if (child == 0) {
    check::in_child() = true;
    alarm(60);
    dup2(ends[1], STDERR_FILENO);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[512];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, size_t(n));
  close(ends[0]);
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && status != 0 ? text : "";
}

inline bool has(const std::string& text, std::initializer_list<std::string> parts) {
  for (const std::string& part : parts)
    if (text.find(part) == std::string::npos) {
      std::printf("\"%s\" is not in: %s\n", part.c_str(), text.c_str());
      return false;
    }
  return true;
}

}  // namespace emulator
