// The update kernels of float16 parameters.
#define AIM_ISA device
#include "cuda/kernels.h"
#include "cuda/update.h"

namespace aim {
namespace device {

template <bool kAdam>
struct Dispatch {
  static __device__ __forceinline__ void run(const Tensor& tensor, const Shared& shared, Kind kind,
                                             int64_t begin, int64_t end, Statistics* partial) {
    update_kinds<Float16, float, kAdam, !kAdam>(tensor, shared, kind, begin, end, partial);
  }
};

__global__ void AIM_BLOCK update_adam_float16(const __grid_constant__ cuda::Work work) {
  update_block<Dispatch<true>>(work);
}

__global__ void AIM_BLOCK update_sgd_float16(const __grid_constant__ cuda::Work work) {
  update_block<Dispatch<false>>(work);
}

}  // namespace device
}  // namespace aim
