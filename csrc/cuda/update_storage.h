// The update kernels of one storage type: AIM_STORAGE, the DType AIM_DTYPE, computed in
// AIM_ARITHMETIC, called AIM_NAME.
// Included by update_<name>.cu, a translation unit each, so that they compile side by side.
#pragma once

#include "cuda/kernels.h"
#include "cuda/update.h"

#define AIM_JOINED(a, b) a##b
#define AIM_KERNEL(prefix, name) AIM_JOINED(prefix, name)

namespace aim {
namespace device {

namespace {  // every unit has another

template <cuda::Family kFamily>
struct Dispatch {
  static constexpr bool kPacked = false;
  static __device__ __forceinline__ bool takes(DType dtype, cuda::Family family) {
    return dtype == DType::AIM_DTYPE && family == kFamily;
  }
  static __device__ __forceinline__ void run(const Tensor& tensor, const Shared& shared,
                                             RuleVariant variant, int64_t begin, int64_t end,
                                             Statistics* partial) {
    update_variants<AIM_STORAGE, AIM_ARITHMETIC, kFamily>(tensor, shared, variant, begin, end,
                                                          partial);
  }
};

}  // namespace

__global__ void AIM_BLOCK AIM_KERNEL(update_adam_,
                                     AIM_NAME)(const __grid_constant__ cuda::Work work) {
  update_block<Dispatch<cuda::kAdamFamily>>(work);
}

__global__ void AIM_BLOCK AIM_KERNEL(update_sgd_,
                                     AIM_NAME)(const __grid_constant__ cuda::Work work) {
  update_block<Dispatch<cuda::kSgdFamily>>(work);
}

__global__ void AIM_BLOCK AIM_KERNEL(update_other_,
                                     AIM_NAME)(const __grid_constant__ cuda::Work work) {
  update_block<Dispatch<cuda::kOtherFamily>>(work);
}

}  // namespace device
}  // namespace aim
