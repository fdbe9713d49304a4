// The update kernel of optimizers whose parameters are of several storage types, or some stepped by
// Adam and some by SGD: still one launch, at the price of the registers of the neediest of them.
#define AIM_ISA device
#include "cuda/kernels.h"
#include "cuda/update.h"

namespace aim {
namespace device {

namespace {

constexpr int kBoth = 1 << cuda::kAdamFamily | 1 << cuda::kSgdFamily;

struct AnyDispatch {
  static constexpr bool kPacked = false;
  static __device__ __forceinline__ bool takes(DType, cuda::Family family) {
    return (kBoth >> family & 1) != 0;
  }
  static __device__ __forceinline__ void run(const Tensor& tensor, const Shared& shared,
                                             RuleVariant variant, int64_t begin, int64_t end,
                                             Statistics* partial) {
    switch (static_cast<DType>(tensor.dtype)) {
      case DType::kFloat32:
        return update_variants<float, float, kBoth>(tensor, shared, variant, begin, end, partial);
      case DType::kFloat64:
        return update_variants<double, double, kBoth>(tensor, shared, variant, begin, end, partial);
      case DType::kBFloat16:
        return update_variants<BFloat16, float, kBoth>(tensor, shared, variant, begin, end,
                                                       partial);
      case DType::kFloat16:
        return update_variants<Float16, float, kBoth>(tensor, shared, variant, begin, end, partial);
    }
  }
};

}  // namespace

__global__ void AIM_BLOCK update_mixed(const __grid_constant__ cuda::Work work) {
  update_block<AnyDispatch>(work);
}

}  // namespace device
}  // namespace aim
