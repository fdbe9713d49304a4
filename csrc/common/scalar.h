// Single numbers: correctly rounded square roots, floats as bits.
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

AIM_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

AIM_INLINE float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

AIM_INLINE uint32_t greater(uint32_t a, uint32_t b) { return a > b ? a : b; }

AIM_INLINE uint32_t as_int(float x) { return float_bits(x); }
AIM_INLINE float as_float(uint32_t x) { return bits_float(x); }

// The same for numbers and vectors of them.
template <class M, class V>
AIM_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

template <class V, class T>
AIM_INLINE V splat(T x) {
  return x - V{};
}

}  // namespace AIM_ISA
}  // namespace aim
