// All kernels; each takes one structure by value.
#pragma once

#include <cuda_runtime.h>

#include "aim/cuda.h"

namespace aim {
namespace device {

// Two blocks on a multiprocessor, one of which computes while the other waits for memory: 128
// registers a thread.
#define AIM_BLOCK __launch_bounds__(cuda::kMostThreads, 2)

struct Copy {
  const void* from;
  void* to;
  int64_t bytes;
};

// One block a chunk, for one storage type and one family of rules.
__global__ void update_adam_float32(const __grid_constant__ cuda::Work work);
__global__ void update_adam_float64(const __grid_constant__ cuda::Work work);
__global__ void update_adam_bfloat16(const __grid_constant__ cuda::Work work);
__global__ void update_adam_float16(const __grid_constant__ cuda::Work work);
__global__ void update_sgd_float32(const __grid_constant__ cuda::Work work);
__global__ void update_sgd_float64(const __grid_constant__ cuda::Work work);
__global__ void update_sgd_bfloat16(const __grid_constant__ cuda::Work work);
__global__ void update_sgd_float16(const __grid_constant__ cuda::Work work);
__global__ void update_other_float32(const __grid_constant__ cuda::Work work);
__global__ void update_other_float64(const __grid_constant__ cuda::Work work);
__global__ void update_other_bfloat16(const __grid_constant__ cuda::Work work);
__global__ void update_other_float16(const __grid_constant__ cuda::Work work);
// For all rules.
__global__ void update_packed_float32(const __grid_constant__ cuda::Work work);
__global__ void update_packed_float64(const __grid_constant__ cuda::Work work);
__global__ void update_packed_bfloat16(const __grid_constant__ cuda::Work work);
__global__ void update_packed_float16(const __grid_constant__ cuda::Work work);

// One block a group. Few blocks with much to add up: as many threads as shared memory allows.
inline constexpr int kFinishThreads = 768;
__global__ void finish(const __grid_constant__ cuda::Work work);

// One block a chunk.
__global__ void emit(const __grid_constant__ cuda::Work work);

__global__ void copy_bytes(const __grid_constant__ Copy copy);

}  // namespace device
}  // namespace aim
