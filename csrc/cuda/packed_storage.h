// The packed update kernel of one storage type: AIM_STORAGE, the DType AIM_DTYPE, computed in
// AIM_ARITHMETIC, called AIM_NAME; of all rules.
// Included by packed_<name>.cu, a translation unit each, so that they compile side by side.
#pragma once

#include "cuda/kernels.h"
#include "cuda/packed.h"

#define AIM_JOINED(a, b) a##b
#define AIM_KERNEL(prefix, name) AIM_JOINED(prefix, name)

namespace aim {
namespace device {

namespace {  // every unit has another

struct Dispatch {
  static constexpr bool kPacked = true;
  static __device__ __forceinline__ bool takes(DType dtype, cuda::Family family) {
    return dtype == DType::AIM_DTYPE && family == cuda::kPackedFamily;
  }
  static __device__ __forceinline__ void run(const Tensor& tensor, const Shared& shared,
                                             RuleVariant variant, int64_t begin, int64_t end,
                                             Statistics* partial) {
    update_packed_variants<AIM_STORAGE, AIM_ARITHMETIC>(tensor, shared, variant, begin, end,
                                                        partial);
  }
  static __device__ __forceinline__ void skip(const Tensor& tensor, int64_t begin, int64_t end) {
    skip_packed<AIM_STORAGE, AIM_ARITHMETIC>(tensor, begin, end);
  }
};

}  // namespace

__global__ void AIM_BLOCK AIM_KERNEL(update_packed_,
                                     AIM_NAME)(const __grid_constant__ cuda::Work work) {
  update_block<Dispatch>(work);
}

}  // namespace device
}  // namespace aim
