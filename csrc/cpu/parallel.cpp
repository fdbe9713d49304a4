#include "cpu/parallel.h"

#include <system_error>
#include <thread>
#include <vector>

namespace aim {

void run_on_new_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> team;
  team.reserve(threads - 1);
  try {
    while (team.size() + 1 < threads) team.emplace_back(body, data);
  } catch (const std::system_error&) {
    // The system gives no more threads; those there are share the tasks.
  }
  body(data);
  for (std::thread& thread : team) thread.join();
}

}  // namespace aim
