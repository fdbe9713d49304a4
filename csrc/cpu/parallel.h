// One parallel region over numbered tasks.
#pragma once

#include <atomic>
#include <cstdint>

#include "aim/step.h"

namespace aim {

// The caller's rounding and flush-to-zero modes, for threads that did not inherit them.
class FloatModes {
 public:
  static FloatModes current() {
    FloatModes modes;
#if defined(__x86_64__)
    modes.word_ = __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(modes.word_));
#endif
    return modes;
  }
  void apply() const {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(static_cast<uint32_t>(word_));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(word_));
#endif
  }

 private:
  uint64_t word_ = 0;
};

// Starts threads for this call and joins them: needs no pool, so nothing can be lost in a fork.
void run_on_new_threads(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Calls task(i) for every i in [0, count), each once, on up to execution.threads threads. Tasks are
// handed out one by one, so a thread that the system slows down takes fewer of them.
template <class Task>
void for_each_task(const Execution& execution, int64_t count, const Task& task) {
  const int64_t threads = count < execution.threads ? count : execution.threads;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Region {
    const Task& task;
    int64_t count;
    FloatModes modes;
    std::atomic<int64_t> next;
  } region{task, count, FloatModes::current(), {0}};
  const auto body = [](void* data) {
    Region& r = *static_cast<Region*>(data);
    const FloatModes own = FloatModes::current();
    r.modes.apply();
    for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.count;) r.task(i);
    own.apply();
  };
  const Team team = execution.team ? execution.team : run_on_new_threads;
  team(body, &region, static_cast<unsigned>(threads), 0);
}

}  // namespace aim
