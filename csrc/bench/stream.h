// The memory floor of a step: the plainest kernel that reads and writes the same bytes of the same
// arrays. The benchmark's alone: no step calls it.
#pragma once

#include "aim/step.h"

namespace aim {
namespace bench {

// How a stream goes over the arrays. What is best differs between machines and sizes: a benchmark
// tries several.
struct StreamPlan {
  // Reads grad, moments and master and writes moments, master and param: 32 bytes a float32
  // parameter. Otherwise reads param, grad and moments and writes param and moments: 28 bytes.
  bool live;
  bool nontemporal;  // writes the live weights past the caches, since nothing reads them here
  int64_t chunk;     // elements that a thread takes at a time; 0: one contiguous share a thread
};

// Adds `factor * grad` to every array that it writes. A factor of zero, which no compiler knows of,
// leaves finite arrays as they are. All tensors must be float32 with gradient and both moments, and
// a master where `plan.live`.
Status stream(const Tensor* tensors, int64_t tensor_count, const StreamPlan& plan, float factor,
              const Execution& execution);

// The same of any arrays, for steps that keep fewer bytes: one run of memory of each, all of as
// many elements.
struct StreamRun {
  void* address;
  int64_t size;  // bytes of an element: 1, 2, 4 or 8
  int32_t reads, writes;
};

// Goes over all runs side by side, `chunk` elements a thread at a time (0: one share a thread):
// reads what is read, adds `add`, byte by byte of an unknown 32-bit number, to what is read and
// written, and fills with it what is only written.
Status stream_runs(const StreamRun* runs, int64_t run_count, int64_t numel, int64_t chunk,
                   int32_t add, const Execution& execution);

}  // namespace bench
}  // namespace aim
