// Numbers in fewer bits between memory and registers: moments, 16-bit weights with what they lack,
// and the random bits that round them. The arithmetic is that of common/packing.h.
//
// A warp holds a row of kPackedBlock neighbouring elements, a few a thread: what the elements of a
// block share, they share within a warp. All threads of a warp call these functions together, those
// behind the last element too, whose `count` is 0 or less.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "aim/cuda.h"
#include "common/packing.h"
#include "common/philox.h"
#include "common/shared.h"
#include "cuda/memory.h"

namespace aim {
namespace AIM_ISA {

inline constexpr int kWarp = 32;

// Elements of a thread. Only float32 arithmetic knows blocks; float64 would lack registers.
template <class T>
inline constexpr int kEach = sizeof(T) == 4 ? static_cast<int>(kPackedBlock) / kWarp : 2;

// The access for so many bytes.
template <int kBytes>
using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint1>>;

// into[k] = from[k] for k < count, zero beyond. `aligned`: to kCount elements.
template <int kCount, class S>
__device__ __forceinline__ void fetch(const S* from, int count, bool aligned, S (&into)[kCount]) {
  using Access = Word<kCount* static_cast<int>(sizeof(S))>;
  if (aligned && count >= kCount) {
    const Access word = *reinterpret_cast<const Access*>(from);
    memcpy(into, &word, sizeof word);
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) into[k] = k < count ? from[k] : S{};
}

// to[k] = from[k] for k < count.
template <int kCount, class S>
__device__ __forceinline__ void put(S* to, int count, bool aligned, const S (&from)[kCount]) {
  using Access = Word<kCount* static_cast<int>(sizeof(S))>;
  if (aligned && count >= kCount) {
    Access word;
    memcpy(&word, from, sizeof word);
    *reinterpret_cast<Access*>(to) = word;
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (k < count) to[k] = from[k];
  }
}

template <int kCount, class S, class T>
__device__ __forceinline__ void fetch_wide(const S* from, int count, bool aligned,
                                           T (&into)[kCount]) {
  S raw[kCount];
  fetch(from, count, aligned, raw);
#pragma unroll
  for (int k = 0; k < kCount; ++k) into[k] = wide(raw[k]);
}

template <int kCount, class S, class T>
__device__ __forceinline__ void put_narrow(S* to, int count, bool aligned,
                                           const T (&from)[kCount]) {
  S raw[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) raw[k] = narrow_to(from[k], S{});
  put(to, count, aligned, raw);
}

// Of a float32 whose lower half is zero.
__device__ __forceinline__ BFloat16 as_bfloat16(uint32_t bits) {
  return {static_cast<uint16_t>(bits >> 16)};
}

// -- random bits ---------------------------------------------------------------------------------

// The bits of a thread's elements of a row that begins at element `index` of the whole parameter,
// whose first element has the global index `base`. Elements in 256 share 16 draws, and a row of 128
// lies in one or two such runs: a draw a thread, and every one is of use to eight threads.
__device__ __forceinline__ void rounding_row(const Shared& shared, Stream stream, int64_t base,
                                             int64_t index, uint32_t (&bits)[kEach<float>]) {
  constexpr int kDraws = 16, kWarps = cuda::kMostThreads / kWarp;
  __shared__ uint32_t drawn[kWarps][2][4][kDraws];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  auto& mine = drawn[threadIdx.x / kWarp];
  const uint32_t first = static_cast<uint32_t>(index / 256) * kDraws;
  const Philox4 r = philox4x32<kRoundingRounds>(
      shared.seed,
      rounding_counter(first + static_cast<uint32_t>(lane), base, shared.counter, stream));
  __syncwarp();  // the row before has been read
#pragma unroll
  for (int word = 0; word < 4; ++word) mine[lane / kDraws][word][lane % kDraws] = r.x[word];
  __syncwarp();
  const int within = static_cast<int>(index % 256) + lane * kEach<float>;
#pragma unroll
  for (int k = 0; k < kEach<float>; ++k) {
    const RoundingPlace place = rounding_place(within + k);
    const uint32_t word = mine[(within + k) / 256][place.word][place.draw % kDraws];
    bits[k] = (word >> place.shift & 0xFFFF) ^ place.flip;
  }
}

// -- moments -------------------------------------------------------------------------------------

// The greatest of a warp.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xFFFFFFFFu, x);
#else
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    x = other > x ? other : x;
  }
  return x;
#endif
}

inline constexpr uint32_t kQuietNan = 0x7FC00000u;

// A number of a block with this exponent.
template <class Format>
__device__ __forceinline__ float unpacked(uint8_t code, int32_t exponent) {
  if (exponent == 255) return bits_float(kQuietNan);
  const uint32_t lowest = static_cast<uint32_t>(packed_lowest<Format>(exponent));
  return packed_value<Format, float>(uint32_t{code}, lowest);
}

// A moment of a tensor: codes (kInt8), bfloat16 or T.
struct StoredMoment {
  void* values;
  uint8_t* scale;
};

// Elements [at, at + count), a thread's of a row.
template <class Format, class T>
__device__ __forceinline__ void read_moment(StoredMoment from, int32_t how, int32_t at, int count,
                                            bool aligned, T (&x)[kEach<T>]) {
  if constexpr (sizeof(T) == 4) {
    if (how == static_cast<int32_t>(Moments::kInt8)) {
      uint8_t codes[kEach<T>];
      fetch(static_cast<const uint8_t*>(from.values) + at, count, aligned, codes);
      const int32_t exponent = from.scale[at / static_cast<int32_t>(kPackedBlock)];
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) x[k] = unpacked<Format>(codes[k], exponent);
      return;
    }
    if (how == static_cast<int32_t>(Moments::kBFloat16)) {
      return fetch_wide(static_cast<const BFloat16*>(from.values) + at, count, aligned, x);
    }
  }
  fetch_wide(static_cast<const T*>(from.values) + at, count, aligned, x);
}

// The number that read_moment() would find at `i`, for whoever reads one at a time.
template <class Format, class T>
__device__ __forceinline__ T moment_at(StoredMoment from, int32_t how, int64_t i) {
  if constexpr (sizeof(T) == 4) {
    if (how == static_cast<int32_t>(Moments::kInt8)) {
      return unpacked<Format>(static_cast<const uint8_t*>(from.values)[i],
                              from.scale[i / kPackedBlock]);
    }
    if (how == static_cast<int32_t>(Moments::kBFloat16)) {
      return wide(static_cast<const BFloat16*>(from.values)[i]);
    }
  }
  return static_cast<const T*>(from.values)[i];
}

// `x` becomes the magnitude of what is stored of it, or that itself. `random`: 16 bits an element,
// for kInt8, and for kBFloat16 where `stochastic`.
template <class Format, class T>
__device__ __forceinline__ void keep_moment(StoredMoment to, int32_t how, bool stochastic,
                                            const uint32_t (&random)[kEach<T>], int32_t at,
                                            int count, bool aligned, T (&x)[kEach<T>]) {
  if constexpr (sizeof(T) == 4) {
    if (how == static_cast<int32_t>(Moments::kInt8)) {
      uint32_t most = 0;
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) {
        if (k < count) most = greater(float_bits(x[k]) & 0x7FFFFFFFu, most);
      }
      const int32_t exponent = packed_exponent<Format>(static_cast<int32_t>(warp_max(most)));
      if (threadIdx.x % kWarp == 0) {
        to.scale[at / static_cast<int32_t>(kPackedBlock)] = static_cast<uint8_t>(exponent);
      }
      uint8_t codes[kEach<T>];
      const uint32_t lowest = static_cast<uint32_t>(packed_lowest<Format>(exponent));
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) {
        const float magnitude = bits_float(float_bits(x[k]) & 0x7FFFFFFFu);
        const uint32_t place = packed_place<Format>(magnitude, lowest, random[k]);
        codes[k] = static_cast<uint8_t>(packed_code<Format>(x[k], place));
        x[k] = packed_magnitude<float>(place, lowest);
        // Of what is not finite, only the exponent tells.
        if (exponent == 255) codes[k] = 0, x[k] = bits_float(kQuietNan);
      }
      return put(static_cast<uint8_t*>(to.values) + at, count, aligned, codes);
    }
    if (how == static_cast<int32_t>(Moments::kBFloat16)) {
      BFloat16 kept[kEach<T>];
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) {
        const uint32_t even = (float_bits(x[k]) >> 16 & 1) + 0x7FFF;
        kept[k] = as_bfloat16(bfloat16_bits<true>(x[k], stochastic ? random[k] : even));
        x[k] = wide(kept[k]);
      }
      return put(static_cast<BFloat16*>(to.values) + at, count, aligned, kept);
    }
  }
  put(static_cast<T*>(to.values) + at, count, aligned, x);
}

// -- weights -------------------------------------------------------------------------------------

// The true weights.
template <class S, class T>
__device__ __forceinline__ void read_weights(const Tensor& tensor, int32_t at, int count,
                                             bool aligned, T (&theta)[kEach<T>]) {
  if (tensor.master) {
    return fetch_wide(static_cast<const T*>(tensor.master) + at, count, aligned, theta);
  }
  S param[kEach<T>];
  fetch(static_cast<const S*>(tensor.param) + at, count, aligned, param);
#pragma unroll
  for (int k = 0; k < kEach<T>; ++k) theta[k] = wide(param[k]);
  if constexpr (sizeof(S) == 2) {
    const Weights how = static_cast<Weights>(tensor.weights);
    if (how != Weights::kSplit && how != Weights::kKahan) return;
    S rest[kEach<T>];
    fetch(static_cast<const S*>(tensor.rest) + at, count, aligned, rest);
#pragma unroll
    for (int k = 0; k < kEach<T>; ++k) {
      if (how == Weights::kKahan) {
        theta[k] = theta[k] + wide(rest[k]);
      } else if constexpr (std::is_same_v<S, BFloat16>) {
        theta[k] = bits_float(joined_bits(uint32_t{param[k].bits}, uint32_t{rest[k].bits}));
      }
    }
  }
}

// What a parameter without a master keeps. `index`: the row's first element in the whole parameter.
template <class S, class T>
__device__ __forceinline__ void keep_weights(const Tensor& tensor, const Shared& shared,
                                             int64_t index, int32_t at, int count, bool aligned,
                                             const T (&theta)[kEach<T>]) {
  S* const param = static_cast<S*>(tensor.param) + at;
  if constexpr (sizeof(S) == 2) {
    const Weights how = static_cast<Weights>(tensor.weights);
    S kept[kEach<T>], rest[kEach<T>];
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (how == Weights::kStochastic) {
        uint32_t random[kEach<T>];
        rounding_row(shared, kWeightStream, tensor.first - tensor.offset, index, random);
#pragma unroll
        for (int k = 0; k < kEach<T>; ++k) {
          kept[k] = as_bfloat16(bfloat16_bits<true>(theta[k], random[k]));
        }
        return put(param, count, aligned, kept);
      }
      if (how == Weights::kSplit) {
#pragma unroll
        for (int k = 0; k < kEach<T>; ++k) {
          uint32_t upper, lower;
          split_bits(float_bits(theta[k]), &upper, &lower);
          kept[k].bits = static_cast<uint16_t>(upper);
          rest[k].bits = static_cast<uint16_t>(lower);
        }
        put(static_cast<S*>(tensor.rest) + at, count, aligned, rest);
        return put(param, count, aligned, kept);
      }
    }
    if (how == Weights::kKahan) {
#pragma unroll
      for (int k = 0; k < kEach<T>; ++k) {
        kept[k] = narrow_to(theta[k], S{});
        const float stored = wide(kept[k]);
        // What overflowed has no rest.
        rest[k] = narrow_to(stored - stored == 0 ? theta[k] - stored : 0.0f, S{});
      }
      put(static_cast<S*>(tensor.rest) + at, count, aligned, rest);
      return put(param, count, aligned, kept);
    }
  }
  put_narrow(param, count, aligned, theta);
}

}  // namespace AIM_ISA
}  // namespace aim
