// Vectors of the processor at hand, as compiler vector types: +, -, *, /, comparisons and ?: work
// on them as on a float. AIM_VECTOR_BYTES is set by the translation unit; sizeof(T) there means
// plain scalars.
#pragma once

#include "common/scalar.h"

#if defined(__x86_64__) && defined(AIM_VECTOR_BYTES)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(AIM_VECTOR_BYTES)
#include <arm_neon.h>
#endif

namespace aim {
namespace AIM_ISA {

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class T>
struct CounterOf;
template <>
struct CounterOf<float> {
  using type = int32_t;
};
template <>
struct CounterOf<double> {
  using type = int64_t;
};

template <class T>
struct Lanes {
#ifdef AIM_VECTOR_BYTES
  static constexpr int kCount = AIM_VECTOR_BYTES / sizeof(T);
  using Vector = typename VectorOf<T, AIM_VECTOR_BYTES>::type;
  using Count = typename VectorOf<typename CounterOf<T>::type, AIM_VECTOR_BYTES>::type;
#else
  static constexpr int kCount = 1;
  using Vector = T;
  using Count = typename CounterOf<T>::type;
#endif
};

#ifdef AIM_VECTOR_BYTES
using FloatVector = Lanes<float>::Vector;
using DoubleVector = Lanes<double>::Vector;
#if AIM_VECTOR_BYTES == 64 && defined(__AVX512F__)
AIM_INLINE FloatVector square_root(FloatVector x) { return (FloatVector)_mm512_sqrt_ps((__m512)x); }
AIM_INLINE DoubleVector square_root(DoubleVector x) {
  return (DoubleVector)_mm512_sqrt_pd((__m512d)x);
}
#elif AIM_VECTOR_BYTES == 32 && defined(__AVX2__)
AIM_INLINE FloatVector square_root(FloatVector x) { return (FloatVector)_mm256_sqrt_ps((__m256)x); }
AIM_INLINE DoubleVector square_root(DoubleVector x) {
  return (DoubleVector)_mm256_sqrt_pd((__m256d)x);
}
#elif AIM_VECTOR_BYTES == 16 && defined(__aarch64__)
AIM_INLINE FloatVector square_root(FloatVector x) {
  return (FloatVector)vsqrtq_f32((float32x4_t)x);
}
AIM_INLINE DoubleVector square_root(DoubleVector x) {
  return (DoubleVector)vsqrtq_f64((float64x2_t)x);
}
#else
// No such unit at hand: lane by lane. Lets the wide kernels be tested on any processor.
template <class V>
AIM_INLINE V square_root(V x) {
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) {
    x[lane] = square_root(static_cast<decltype(x[0] + 0)>(x[lane]));
  }
  return x;
}
#endif
#endif

#ifdef AIM_VECTOR_BYTES
using IntVector = Lanes<float>::Count;
AIM_INLINE IntVector as_int(FloatVector x) { return (IntVector)x; }
AIM_INLINE FloatVector as_float(IntVector x) { return (FloatVector)x; }
#if AIM_VECTOR_BYTES == 64 && defined(__AVX512F__)
AIM_INLINE IntVector greater(IntVector a, IntVector b) {
  return (IntVector)_mm512_max_epi32((__m512i)a, (__m512i)b);
}
#elif AIM_VECTOR_BYTES == 32 && defined(__AVX2__)
AIM_INLINE IntVector greater(IntVector a, IntVector b) {
  return (IntVector)_mm256_max_epi32((__m256i)a, (__m256i)b);
}
#else
AIM_INLINE IntVector greater(IntVector a, IntVector b) { return a > b ? a : b; }
#endif
#else
using FloatVector = float;
using IntVector = uint32_t;
#endif

AIM_INLINE int32_t first_lane(IntVector x) {
  int32_t lane;
  __builtin_memcpy(&lane, &x, sizeof lane);
  return lane;
}

// The greatest of lanes that are not negative.
AIM_INLINE int32_t greatest_lane(IntVector x) {
#if defined(AIM_VECTOR_BYTES) && AIM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t lanes[sizeof x / sizeof(int32_t)], greatest = 0;
  __builtin_memcpy(lanes, &x, sizeof lanes);
  for (const int32_t lane : lanes) greatest = lane > greatest ? lane : greatest;
  return greatest;
#endif
}

// Adds one to the counters of the lanes that are set (a set lane of a vector mask is -1).
template <class Count, class Mask>
AIM_INLINE void add_mask(Count& count, Mask mask) {
#ifdef AIM_VECTOR_BYTES
  count -= (Count)mask;
#else
  count += mask;
#endif
}

template <class V, class T>
AIM_INLINE V load(const T* from) {
  V x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <class V, class T>
AIM_INLINE void store(T* to, V x) {
  __builtin_memcpy(to, &x, sizeof x);
}

}  // namespace AIM_ISA
}  // namespace aim
