// Correctly rounded square roots of single numbers.
#pragma once

#include "common/platform.h"

namespace aim {
namespace AIM_ISA {

AIM_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

AIM_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace AIM_ISA
}  // namespace aim
