// Between memory and float32: vectors of fewer bits, and runs of 16-bit parameters in all their
// ways of keeping true weights.
#pragma once

#include "cpu/rounding.h"
// after vector.h, whose conversions it uses
#include "common/packing.h"

namespace aim {
namespace AIM_ISA {

// Lanes of 8 or 16 bits as those of 32, and the lower bits of those. By hand where the compiler
// would move them one by one.
#if defined(AIM_VECTOR_BYTES) && AIM_VECTOR_BYTES == 64 && defined(__AVX512F__)
AIM_INLINE IntVector from_small(const uint8_t* from) {
  return (IntVector)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
AIM_INLINE IntVector from_small(const uint16_t* from) {
  return (IntVector)_mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
AIM_INLINE void to_small(IntVector x, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
}
AIM_INLINE void to_small(IntVector x, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)x));
}
#elif defined(AIM_VECTOR_BYTES) && AIM_VECTOR_BYTES == 32 && defined(__AVX2__)
AIM_INLINE IntVector from_small(const uint8_t* from) {
  return (IntVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
AIM_INLINE IntVector from_small(const uint16_t* from) {
  return (IntVector)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// Packing works within halves of 16 bytes; what is wanted of either is then put together.
AIM_INLINE __m128i packed_halves(IntVector x) {
  const __m256i words = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
}
AIM_INLINE void to_small(IntVector x, uint8_t* to) {
  const __m128i words = packed_halves(x);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}
AIM_INLINE void to_small(IntVector x, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed_halves(x));
}
#elif defined(AIM_VECTOR_BYTES)
template <class U>
AIM_INLINE IntVector from_small(const U* from) {
  IntVector x;
  for (unsigned lane = 0; lane < sizeof x / sizeof x[0]; ++lane) x[lane] = from[lane];
  return x;
}
template <class U>
AIM_INLINE void to_small(IntVector x, U* to) {
  for (unsigned lane = 0; lane < sizeof x / sizeof x[0]; ++lane) to[lane] = static_cast<U>(x[lane]);
}
#else
template <class U>
AIM_INLINE IntVector from_small(const U* from) {
  return *from;
}
template <class U>
AIM_INLINE void to_small(IntVector x, U* to) {
  *to = static_cast<U>(x);
}
#endif

// Once for all kernels: a call for every 128 elements costs less than the code of all its copies.
#define AIM_CALLED inline __attribute__((noinline))

// Elements of one vector.
constexpr int kStep = Lanes<float>::kCount;

// -- weights -------------------------------------------------------------------------------------

AIM_INLINE float widened_one(float x) { return x; }
AIM_INLINE double widened_one(double x) { return x; }
AIM_INLINE float widened_one(BFloat16 x) { return widen(x); }
AIM_INLINE float widened_one(Float16 x) { return widen(x); }

AIM_INLINE float narrowed_to(float x, float) { return x; }
AIM_INLINE double narrowed_to(double x, double) { return x; }
AIM_INLINE BFloat16 narrowed_to(float x, BFloat16 s) { return narrow(x, s); }
AIM_INLINE Float16 narrowed_to(float x, Float16 s) { return narrow(x, s); }

// The true weights [at, at + count) of a tensor without a master.
template <class S>
AIM_CALLED void read_weights(const Tensor& tensor, int64_t at, int64_t count, float* to) {
  const S* const param = static_cast<const S*>(tensor.param) + at;
  const uint16_t* const rest = static_cast<const uint16_t*>(tensor.rest) + (tensor.rest ? at : 0);
  const Weights how = static_cast<Weights>(tensor.weights);
  if (how == Weights::kSplit) {
    const uint16_t* const upper = reinterpret_cast<const uint16_t*>(param);
    for (int64_t i = 0; i < count; ++i) {
      to[i] = as_float(joined_bits(uint32_t{upper[i]}, uint32_t{rest[i]}));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = widened_one(param[i]);
  if (how != Weights::kKahan) return;
  const S* const lost = reinterpret_cast<const S*>(rest);
  for (int64_t i = 0; i < count; ++i) to[i] = to[i] + widened_one(lost[i]);
}

// The inverse. `random` keeps what it has drawn from call to call.
template <class S>
AIM_CALLED void keep_weights(const Tensor& tensor, const Shared& shared, RoundingBits& random,
                             const float* from, int64_t at, int64_t count) {
  S* const param = static_cast<S*>(tensor.param) + at;
  uint16_t* const upper = reinterpret_cast<uint16_t*>(param);
  uint16_t* const rest = static_cast<uint16_t*>(tensor.rest) + (tensor.rest ? at : 0);
  switch (static_cast<Weights>(tensor.weights)) {
    case Weights::kNearest:
      for (int64_t i = 0; i < count; ++i) param[i] = narrowed_to(from[i], S{});
      return;
    case Weights::kStochastic:
      for (int64_t begin = 0; begin < count; begin += RoundingBits::kCount) {
        const int64_t size =
            count - begin < RoundingBits::kCount ? count - begin : RoundingBits::kCount;
        const uint32_t* const drawn = random.of_block(
            shared, kWeightStream, tensor.first - tensor.offset, tensor.offset + at + begin);
        for (int64_t i = 0; i < size; ++i) {
          upper[begin + i] =
              static_cast<uint16_t>(bfloat16_bits<true>(from[begin + i], drawn[i]) >> 16);
        }
      }
      return;
    case Weights::kSplit:
      for (int64_t i = 0; i < count; ++i) {
        uint32_t high, low;
        split_bits(as_int(from[i]), &high, &low);
        upper[i] = static_cast<uint16_t>(high);
        rest[i] = static_cast<uint16_t>(low);
      }
      return;
    case Weights::kKahan:
      for (int64_t i = 0; i < count; ++i) {
        param[i] = narrowed_to(from[i], S{});
        const float kept = widened_one(param[i]);
        // What overflowed has no rest.
        const float lost = kept - kept == 0 ? from[i] - kept : 0.0f;
        reinterpret_cast<S*>(rest)[i] = narrowed_to(lost, S{});
      }
      return;
  }
}

// The master takes the elements whose parameter is not what a step leaves of them. Mostly there are
// none: looking for them writes nothing.
template <class S, class T>
AIM_CALLED void adopt_edits(const S* param, int64_t count, T* master) {
  decltype(bits_of(S{})) differ = 0;
  for (int64_t i = 0; i < count; ++i) {
    differ |= bits_of(param[i]) ^ bits_of(narrowed_to(master[i], S{}));
  }
  if (differ == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    const bool edited = bits_of(param[i]) != bits_of(narrowed_to(master[i], S{}));
    master[i] = edited ? widened_one(param[i]) : master[i];
  }
}

// -- beside the update ---------------------------------------------------------------------------

template <class T>
AIM_CALLED void move_average(const Uniforms<T>& u, const T* theta, int64_t count, T* ema) {
  for (int64_t i = 0; i < count; ++i) ema[i] = ema[i] * u.ema_keep + theta[i] * u.ema_add;
}

}  // namespace AIM_ISA
}  // namespace aim
