// Loads and stores of a few neighbouring elements: 16 bytes an access where the addresses allow it,
// element by element at the end of a tensor and where they do not.
#pragma once

#include <cuda_runtime.h>

#include "common/convert.h"

namespace aim {
namespace AIM_ISA {

// Elements of a thread's share of a vector: 16 bytes of the storage type.
template <class S>
inline constexpr int kWidth = static_cast<int>(16 / sizeof(S));

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(BFloat16 x) { return widen(x); }
__device__ __forceinline__ float wide(Float16 x) { return widen(x); }

__device__ __forceinline__ float narrow_to(float x, float) { return x; }
__device__ __forceinline__ double narrow_to(double x, double) { return x; }
__device__ __forceinline__ BFloat16 narrow_to(float x, BFloat16 like) { return narrow(x, like); }
__device__ __forceinline__ Float16 narrow_to(float x, Float16 like) { return narrow(x, like); }

// A pointer that came out of a table could point anywhere, and would be followed with the slower
// generic instructions.
template <class P>
__device__ __forceinline__ P* in_global(P* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

__device__ __forceinline__ Tensor in_global(Tensor t) {
  t.param = in_global(t.param);
  t.grad = in_global(t.grad);
  t.exp_avg = in_global(t.exp_avg);
  t.exp_avg_sq = in_global(t.exp_avg_sq);
  t.extra = in_global(t.extra);
  t.master = in_global(t.master);
  t.anchor = in_global(t.anchor);
  t.exp_avg_scale = in_global(t.exp_avg_scale);
  t.exp_avg_sq_scale = in_global(t.exp_avg_sq_scale);
  t.extra_scale = in_global(t.extra_scale);
  t.rest = in_global(t.rest);
  t.ema = in_global(t.ema);
  return t;
}

// Neighbouring elements as they lie in memory.
template <class S, int kCount>
struct alignas(16) Raw {
  S x[kCount];
};

// into[k] = from[k] for k < count, zero beyond.
template <int kCount, class T, class S>
__device__ __forceinline__ void load(const S* from, int count, bool aligned, T (&into)[kCount]) {
  constexpr int kAccesses = kCount * static_cast<int>(sizeof(S)) / 16;
  if constexpr (kAccesses > 0) {
    if (aligned && count >= kCount) {
      uint4 words[kAccesses];
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
      Raw<S, kCount> raw;
      memcpy(&raw, words, sizeof words);
#pragma unroll
      for (int k = 0; k < kCount; ++k) into[k] = wide(raw.x[k]);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) into[k] = k < count ? wide(from[k]) : T{0};
}

// to[k] = from[k] for k < count.
template <int kCount, class T, class S>
__device__ __forceinline__ void store(S* to, int count, bool aligned, const T (&from)[kCount]) {
  constexpr int kAccesses = kCount * static_cast<int>(sizeof(S)) / 16;
  if constexpr (kAccesses > 0) {
    if (aligned && count >= kCount) {
      Raw<S, kCount> raw;
#pragma unroll
      for (int k = 0; k < kCount; ++k) raw.x[k] = narrow_to(from[k], S{});
      uint4 words[kAccesses];
      memcpy(words, &raw, sizeof words);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (k < count) to[k] = narrow_to(from[k], S{});
  }
}

__device__ __forceinline__ bool on_16_bytes(const Tensor& t) {
  const uint64_t all = reinterpret_cast<uint64_t>(t.param) | reinterpret_cast<uint64_t>(t.grad) |
                       reinterpret_cast<uint64_t>(t.exp_avg) |
                       reinterpret_cast<uint64_t>(t.exp_avg_sq) |
                       reinterpret_cast<uint64_t>(t.extra) | reinterpret_cast<uint64_t>(t.master) |
                       reinterpret_cast<uint64_t>(t.anchor);
  return all % 16 == 0;
}

}  // namespace AIM_ISA
}  // namespace aim
