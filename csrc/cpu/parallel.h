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

// Calls task(i) for every i in [0, count), each once, on up to execution.threads threads. Every
// thread begins with a contiguous share, which memory likes best, and then takes what is left of
// the others', so that one that the system slows down holds up nobody.
template <class Task>
void for_each_task(const Execution& execution, int64_t count, const Task& task) {
  constexpr int64_t kMostThreads = 256;
  int64_t threads = count < execution.threads ? count : execution.threads;
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Region {
    const Task& task;
    FloatModes modes;
    int64_t threads;
    std::atomic<int64_t> arrived;
    Share shares[kMostThreads];
  } region{task, FloatModes::current(), threads, {0}, {}};
  for (int64_t k = 0; k < threads; ++k) {
    region.shares[k].next.store(count * k / threads, std::memory_order_relaxed);
    region.shares[k].end = count * (k + 1) / threads;
  }
  const auto body = [](void* data) {
    Region& r = *static_cast<Region*>(data);
    const FloatModes own = FloatModes::current();
    r.modes.apply();
    const int64_t first = r.arrived.fetch_add(1, std::memory_order_relaxed);
    for (int64_t k = 0; k < r.threads; ++k) {
      Share& share = r.shares[(first + k) % r.threads];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
        r.task(i);
      }
    }
    own.apply();
  };
  const ThreadPool pool = execution.pool ? execution.pool : run_on_new_threads;
  pool(body, &region, static_cast<unsigned>(threads), 0);
}

}  // namespace aim
