#include "cpu/parallel.h"

#include <system_error>
#include <thread>
#include <vector>

namespace aim {

void run_on_new_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (others.size() + 1 < threads) others.emplace_back(body, data);
  } catch (const std::system_error&) {
    // The system gives no more threads; those there are share the tasks.
  }
  body(data);
  for (std::thread& thread : others) thread.join();
}

}  // namespace aim
