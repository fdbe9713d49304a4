// Live weights from stored state: for parameters without a gradient, and for train().
#pragma once

#include <cuda_runtime.h>

#include "aim/cuda.h"
#include "common/element.h"
#include "common/shared.h"
#include "cuda/memory.h"

namespace aim {
namespace AIM_ISA {

template <class S, class T>
__device__ __forceinline__ void emit_chunk(const Tensor& tensor, const Shared& shared,
                                           int64_t begin, int64_t end) {
  const Uniforms<T> u = rounded<T>(shared.u);
  const T* const theta = static_cast<const T*>(tensor.master);
  const T* const m = static_cast<const T*>(tensor.exp_avg);
  const T* const v = static_cast<const T*>(tensor.exp_avg_sq);
  const T* const anchor = static_cast<const T*>(tensor.anchor);
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const bool under = !(m && v) || is_under(m[i], v[i], u.old_v, u.old_0);
    const T c = under ? u.live[kUnder] : u.live[kWell];
    static_cast<S*>(tensor.param)[i] =
        narrow_to(live_weight(theta[i], anchor ? anchor[i] : T{0}, c), S{});
  }
}

__device__ __forceinline__ void emit_any(const Tensor& tensor, const Shared& shared, int64_t begin,
                                         int64_t end) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kFloat32:
      return emit_chunk<float, float>(tensor, shared, begin, end);
    case DType::kFloat64:
      return emit_chunk<double, double>(tensor, shared, begin, end);
    case DType::kBFloat16:
      return emit_chunk<BFloat16, float>(tensor, shared, begin, end);
    case DType::kFloat16:
      return emit_chunk<Float16, float>(tensor, shared, begin, end);
  }
}

}  // namespace AIM_ISA
}  // namespace aim
