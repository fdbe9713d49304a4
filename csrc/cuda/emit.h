// Live weights from stored state: for parameters without a gradient, and for train().
#pragma once

#include <cuda_runtime.h>

#include "aim/cuda.h"
#include "common/element.h"
#include "common/shared.h"
#include "cuda/codec.h"
#include "cuda/memory.h"

namespace aim {
namespace AIM_ISA {

// kPacked: moments may be stored in fewer bits.
template <bool kPacked, class S, class T>
__device__ __forceinline__ void emit_chunk(const Tensor& tensor, const Shared& shared,
                                           int64_t begin, int64_t end) {
  const Uniforms<T> u = rounded<T>(shared.u);
  const T* const theta = static_cast<const T*>(tensor.master);
  const StoredMoment m{tensor.exp_avg, tensor.exp_avg_scale},
      v{tensor.exp_avg_sq, tensor.exp_avg_sq_scale};
  const int32_t how = kPacked ? tensor.moments : static_cast<int32_t>(Moments::kWide);
  const T* const anchor = static_cast<const T*>(tensor.anchor);
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const bool under = !(m.values && v.values) ||
                       is_under(moment_at<PackedFirst, T>(m, how, i),
                                moment_at<PackedSecond, T>(v, how, i), u.old_c_v, u.old_c_0);
    const T c = under ? u.live[kUnder] : u.live[kWell];
    static_cast<S*>(tensor.param)[i] =
        narrow_to(live_weight(theta[i], anchor ? anchor[i] : T{0}, c), S{});
  }
}

// The master takes the elements whose parameter is not what a step leaves of them.
template <class S, class T>
__device__ __forceinline__ void adopt_chunk(const Tensor& tensor, int64_t begin, int64_t end) {
  const S* const param = static_cast<const S*>(tensor.param);
  T* const master = static_cast<T*>(tensor.master);
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const S here = param[i];
    if (bits_of(here) != bits_of(narrow_to(master[i], S{}))) master[i] = wide(here);
  }
}

__device__ __forceinline__ void adopt_any(const Tensor& tensor, int64_t begin, int64_t end) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kFloat32:
      return adopt_chunk<float, float>(tensor, begin, end);
    case DType::kFloat64:
      return adopt_chunk<double, double>(tensor, begin, end);
    case DType::kBFloat16:
      return adopt_chunk<BFloat16, float>(tensor, begin, end);
    case DType::kFloat16:
      return adopt_chunk<Float16, float>(tensor, begin, end);
  }
}

template <bool kPacked>
__device__ __forceinline__ void emit_any(const Tensor& tensor, const Shared& shared, int64_t begin,
                                         int64_t end) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kFloat32:
      return emit_chunk<kPacked, float, float>(tensor, shared, begin, end);
    case DType::kFloat64:
      return emit_chunk<kPacked, double, double>(tensor, shared, begin, end);
    case DType::kBFloat16:
      return emit_chunk<kPacked, BFloat16, float>(tensor, shared, begin, end);
    case DType::kFloat16:
      return emit_chunk<kPacked, Float16, float>(tensor, shared, begin, end);
  }
}

}  // namespace AIM_ISA
}  // namespace aim
