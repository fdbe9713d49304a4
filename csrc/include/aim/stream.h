// The memory floor of a step: the plainest kernel that reads and writes the same bytes of the same
// arrays.
#pragma once

#include "aim/step.h"

namespace aim {

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

}  // namespace aim
