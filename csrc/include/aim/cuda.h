// The fused step on a CUDA device. Every pointer is to that device's memory; nothing is read on the
// host, nothing waits for the device, everything runs on the caller's stream.
//
// A step is two launches: update() moves all tensors of all groups, finish() adds up what the
// blocks measured and moves thresholds, step counts and the phase. docs/design.md gives the
// formulae; Python's device.py builds the tables.
#pragma once

#include <cstdint>

#include "aim/step.h"

namespace aim {
namespace cuda {

// The elements [index * chunk_size, (index + 1) * chunk_size) of a tensor, or what it has of them.
// One block steps one chunk.
struct Chunk {
  int32_t tensor;
  int32_t index;
};

// What belongs to one group: tensors and chunks [begin, end) in the tables.
struct Span {
  int64_t tensor_begin, tensor_end, chunk_begin, chunk_end;
};

// What shares a kernel: rules (AMSGrad is of the others), and, of any rule, the tensors that keep
// moments or weights in fewer bits, have an average or leave their gradient as zeros.
enum Family : int { kAdamFamily, kSgdFamily, kOtherFamily, kPackedFamily };
inline constexpr int kAllFamilies = 15;

struct Work {
  const Tensor* tensors;
  const Group* groups;
  Row* rows;
  Statistics* statistics;
  Control* control;
  const Chunk* chunks;
  const Span* spans;     // [group_count]
  Statistics* partials;  // [chunk_count]; update() fills it, finish() adds it up
  int64_t* phases;       // [2]: update() leaves its phase and the next here, for finish()
  // Where the tensors lie on several devices, one of them is the primary. Elsewhere finish() only
  // writes the group's sums here and counts steps; null: the primary.
  Statistics* sums;
  // On the primary: the other devices' sums, [others_count, group_count].
  const Statistics* others;
  const float* grad_scale;  // gradients are divided by it first; null: 1
  const float* found_inf;   // the step is skipped whole where it is not 0; null: never
  int64_t chunk_count, group_count, others_count;
  // Elements, at most kMostChunk; a multiple of 64, and of kPackedBlock for the packed family.
  int32_t chunk_size;
  int32_t threads;  // of a block, a multiple of 32, at most kMostThreads
  // What there is among the tensors, which the host knows and which chooses the kernel: bit i for
  // DType i, and for Family i.
  int32_t dtypes, families;
};

inline constexpr int32_t kMostThreads = 256;
inline constexpr int32_t kMostChunk = 1 << 30;  // positions in a chunk have 32 bits

// What came of a call: the runtime's error, and which of its functions it came from.
struct Result {
  int32_t error;  // cudaError_t; 0: none
  const char* call;
};
const char* describe(const Result& result);

// The step of every tensor that has a gradient (docs/design.md, steps 0 to 6), and the emission of
// live weights for those that have a master but no gradient. Fills partials.
Result update(const Work& work, int32_t device, void* stream);

// Step 7: sums, thresholds, latched columns, step counts, phase.
Result finish(const Work& work, int32_t device, void* stream);

// Writes the live weights of all tensors that have a master, from stored state, `tau_prev` and the
// emitted columns.
Result emit(const Work& work, int32_t device, void* stream);

// The memory floor: copies `bytes` from one place to another, 16 bytes a thread and access.
Result copy_bytes(const void* from, void* to, int64_t bytes, int32_t device, void* stream);

}  // namespace cuda
}  // namespace aim
