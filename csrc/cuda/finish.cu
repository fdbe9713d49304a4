// What is left of a step when all elements are moved, emission on its own, and the memory floor.
#define AIM_ISA device
#include "cuda/block.h"
#include "cuda/emit.h"
#include "cuda/kernels.h"

namespace aim {
namespace device {

// One block a group. Nobody reads control, which one of the blocks moves: update() left the phases
// of this step and of the next in `phases`.
__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ cuda::Work work) {
  if (skipped(work)) return;
  constexpr int kColumns = sizeof(Statistics) / sizeof(double);
  const int64_t group = blockIdx.x;
  if (group == 0 && threadIdx.x == 0 && !work.sums) {
    work.control->phase = work.phases[1];
    work.control->counter += 1;
  }
  if (group >= work.group_count) return;
  const cuda::Span span = work.spans[group];
  Row* const row = &work.rows[group];
  const bool held = is_held(*row, row->phases[work.phases[0] & 1]);
  for (int64_t i = span.tensor_begin + threadIdx.x; i < span.tensor_end; i += blockDim.x) {
    if (work.tensors[i].grad && !held) *work.tensors[i].step += 1;
  }
  double mine[kColumns] = {};
  for (int64_t i = span.chunk_begin + threadIdx.x; i < span.chunk_end; i += blockDim.x) {
    const double* const partial = reinterpret_cast<const double*>(work.partials + i);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) mine[c] += partial[c];
  }
  double total = sum_columns<kFinishThreads>(mine);
  __shared__ Statistics sums;
  if (threadIdx.x < kColumns) {
    for (int64_t k = 0; k < work.others_count; ++k) {
      const Statistics* const other = work.others + k * work.group_count + group;
      total += reinterpret_cast<const double*>(other)[threadIdx.x];
    }
    reinterpret_cast<double*>(&sums)[threadIdx.x] = total;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (work.sums) {
    work.sums[group] = sums;
    return;
  }
  finish_row(work.groups[group], sums, held, work.phases[1], row);
  if (sums.numel > 0) work.statistics[group] = sums;
}

__global__ void AIM_BLOCK emit(const __grid_constant__ cuda::Work work) {
  __shared__ Shared shared;
  const cuda::Chunk chunk = work.chunks[blockIdx.x];
  const Tensor tensor = in_global(work.tensors[chunk.tensor]);
  if (!tensor.master) return;
  if (threadIdx.x == 0) {
    const Group& group = work.groups[tensor.group];
    const Row& row = work.rows[tensor.group];
    const RuleVariant variant = variant_of(tensor, group);
    shared = emission_of(tensor, group, variant, has_classes(tensor, variant), row.tau_prev,
                         row.emitted);
  }
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(chunk.index) * work.chunk_size;
  const int64_t most = begin + work.chunk_size;
  emit_any<true>(tensor, shared, begin, tensor.numel < most ? tensor.numel : most);
}

__global__ void __launch_bounds__(1024) copy_bytes(const __grid_constant__ Copy copy) {
  const int64_t count = copy.bytes / 16, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < count; i += stride)
    static_cast<uint4*>(copy.to)[i] = static_cast<const uint4*>(copy.from)[i];
  const int64_t rest = count * 16 + first;
  if (rest < copy.bytes)
    static_cast<char*>(copy.to)[rest] = static_cast<const char*>(copy.from)[rest];
}

}  // namespace device
}  // namespace aim
