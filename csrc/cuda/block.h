// What the threads of a block do together: uniforms made by one of them, sums added up in a fixed
// order.
#pragma once

#include <cuda_runtime.h>

#include "aim/cuda.h"
#include "common/shared.h"

namespace aim {
namespace AIM_ISA {

// Adds column c over all threads; thread c < kColumns returns its sum. The order is fixed: thread i
// of the first 32 adds those of i, i + 32, ..., then one adds the 32 sums.
template <int kMostThreads, int kColumns>
__device__ __forceinline__ double sum_columns(const double (&mine)[kColumns]) {
  constexpr int kLanes = 32;
  __shared__ double columns[kColumns * kMostThreads];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) columns[c * threads + thread] = mine[c];
  __syncthreads();
  if (thread < kLanes) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      double sum = 0;
      for (int i = thread; i < threads; i += kLanes) sum += columns[c * threads + i];
      columns[c * threads + thread] = sum;
    }
  }
  __syncthreads();
  double total = 0;
  if (thread < kColumns) {
    for (int i = 0; i < kLanes; ++i) total += columns[thread * threads + i];
  }
  return total;
}

__device__ __forceinline__ bool skipped(const cuda::Work& work) {
  return work.found_inf && *work.found_inf != 0;
}

__device__ __forceinline__ double learning_rate(const Group& group) {
  if (!group.lr_tensor) return group.lr;
  return static_cast<DType>(group.lr_dtype) == DType::kFloat64
             ? *static_cast<const double*>(group.lr_tensor)
             : static_cast<double>(*static_cast<const float*>(group.lr_tensor));
}

// What the elements of a tensor share in this step.
__device__ __forceinline__ Shared uniforms_of(const cuda::Work& work, const Tensor& tensor) {
  const Group& group = work.groups[tensor.group];
  const Row& row = work.rows[tensor.group];
  const RuleVariant variant = variant_of(tensor, group);
  const bool classed = has_classes(tensor, variant);
  const PhaseRow& next = row.phases[draw_phase(*work.control)];
  if (!tensor.grad) return emission_of(tensor, group, variant, classed, row.tau, next.live);
  const double deviation = row.noise != 0 ? standard_deviation(work.statistics[tensor.group]) : 0;
  const double scale = work.grad_scale ? group.scale * (1.0 / *work.grad_scale) : group.scale;
  return shared_of({group, row, row.phases[work.control->phase & 1], next, *work.control, variant,
                    classed, *tensor.step, learning_rate(group), scale, deviation});
}

}  // namespace AIM_ISA
}  // namespace aim
