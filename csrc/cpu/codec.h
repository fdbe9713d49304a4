// Runs of numbers between memory and float32 buffers: 16-bit parameters in all their ways of
// keeping true weights, and moments in fewer bits.
#pragma once

#include "cpu/rounding.h"
// after vector.h, whose conversions it uses
#include "common/packing.h"

namespace aim {
namespace AIM_ISA {

template <class U, int kBytes>
struct SmallVectorOf {
  typedef U type __attribute__((vector_size(kBytes)));
};

// Lanes of 8 or 16 bits as those of 32, and the lower bits of those.
template <class U>
AIM_INLINE IntVector from_small(const U* from) {
#ifdef AIM_VECTOR_BYTES
  using Small = typename SmallVectorOf<U, Lanes<float>::kCount * sizeof(U)>::type;
  Small small;
  __builtin_memcpy(&small, from, sizeof small);
  return __builtin_convertvector(small, IntVector);
#else
  return *from;
#endif
}

template <class U>
AIM_INLINE void to_small(IntVector x, U* to) {
#ifdef AIM_VECTOR_BYTES
  using Small = typename SmallVectorOf<U, Lanes<float>::kCount * sizeof(U)>::type;
  const Small small = __builtin_convertvector(x, Small);
  __builtin_memcpy(to, &small, sizeof small);
#else
  *to = static_cast<U>(x);
#endif
}

// Once for all kernels: a call for every 128 elements costs less than the code of all its copies.
#define AIM_CALLED inline __attribute__((noinline))

// Elements of one step of the loops below: one vector.
constexpr int kStep = Lanes<float>::kCount;

// Buffers that the functions below write to, and read from where `count` is no multiple of a
// vector, reach to the next one.

AIM_INLINE void from_bfloat16(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store(to + i, as_float(from_small(from + i) << 16));
  for (; i < count; ++i) to[i] = bits_float(uint32_t{from[i]} << 16);
}

// -- moments -------------------------------------------------------------------------------------
//
// `random`: 16 bits an element, for kPackedBlock elements; read where kRandom. What is stored
// replaces the values in `x`.

template <bool kRandom>
AIM_INLINE void keep_bfloat16(float* x, int64_t count, const uint32_t* random, uint16_t* to) {
  uint16_t bits[kPackedBlock];
  for (int64_t i = 0; i < count; i += kStep) {
    const IntVector drawn = kRandom ? load<IntVector>(random + i) : IntVector{};
    const IntVector kept = bfloat16_bits<kRandom>(as_int(load<FloatVector>(x + i)), drawn);
    store(x + i, as_float(kept << 16));
    to_small(kept, bits + i);
  }
  __builtin_memcpy(to, bits, static_cast<size_t>(count) * sizeof bits[0]);
}

template <class Format>
AIM_INLINE void from_packed(const uint8_t* from, uint8_t exponent, int64_t count, float* to) {
  if (exponent == 255) {
    for (int64_t i = 0; i < count; ++i) to[i] = bits_float(0x7FC00000u);
    return;
  }
  const int32_t lowest = packed_lowest<Format>(exponent);
  const float lowest_float = bits_float(static_cast<uint32_t>(lowest));
  const auto wide = splat<FloatVector>(lowest_float);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    store(to + i, packed_value<Format>(from_small(from + i), splat<IntVector>(lowest), wide));
  }
  for (; i < count; ++i) {
    to[i] = packed_value<Format>(uint32_t{from[i]}, static_cast<uint32_t>(lowest), lowest_float);
  }
}

template <class Format, bool kRandom>
AIM_INLINE void keep_packed(float* x, int64_t count, const uint32_t* random, uint8_t* to,
                            uint8_t* exponent) {
  for (int64_t i = count; i % kStep != 0; ++i) x[i] = 0;  // or they might be the greatest
  IntVector most{};
  for (int64_t i = 0; i < count; i += kStep) {
    const IntVector magnitude = as_int(load<FloatVector>(x + i)) & 0x7FFFFFFF;
    most = select(magnitude > most, magnitude, most);
  }
  uint32_t lanes[kStep], greatest = 0;
  __builtin_memcpy(lanes, &most, sizeof lanes);
  for (const uint32_t lane : lanes) greatest = lane > greatest ? lane : greatest;
  const int32_t shared = packed_exponent<Format>(static_cast<int32_t>(greatest));
  *exponent = static_cast<uint8_t>(shared);
  uint8_t codes[kPackedBlock];
  if (shared == 255) {
    for (int64_t i = 0; i < count; ++i) x[i] = bits_float(0x7FC00000u), codes[i] = 0;
  } else {
    const auto lowest = splat<IntVector>(packed_lowest<Format>(shared));
    const FloatVector wide = as_float(lowest);
    for (int64_t i = 0; i < count; i += kStep) {
      const IntVector drawn = kRandom ? load<IntVector>(random + i) : IntVector{};
      const IntVector code =
          packed_code<Format, kRandom>(load<FloatVector>(x + i), lowest, wide, drawn);
      store(x + i, packed_value<Format>(code, lowest, wide));
      to_small(code, codes + i);
    }
  }
  __builtin_memcpy(to, codes, static_cast<size_t>(count));
}

// One moment of a tensor, in blocks.
struct StoredMoment {
  void* values;
  uint8_t* scale;
  Moments how;
  bool is_signed, stochastic;

  // Elements [at, at + count) of one block.
  AIM_CALLED void read(int64_t at, int64_t count, float* to) const {
    if (how == Moments::kBFloat16) {
      return from_bfloat16(static_cast<const uint16_t*>(values) + at, count, to);
    }
    if (how == Moments::kWide) {
      __builtin_memcpy(to, static_cast<const float*>(values) + at, count * sizeof(float));
      return;
    }
    const uint8_t* const from = static_cast<const uint8_t*>(values) + at;
    const uint8_t exponent = scale[at / kPackedBlock];
    if (is_signed) return from_packed<PackedFirst>(from, exponent, count, to);
    from_packed<PackedSecond>(from, exponent, count, to);
  }

  // `x` becomes what is stored of it.
  AIM_CALLED void keep(float* x, int64_t at, int64_t count, const uint32_t* random) const {
    stochastic ? keep_as<true>(x, at, count, random) : keep_as<false>(x, at, count, random);
  }

 private:
  template <bool kRandom>
  AIM_INLINE void keep_as(float* x, int64_t at, int64_t count, const uint32_t* random) const {
    if (how == Moments::kBFloat16) {
      return keep_bfloat16<kRandom>(x, count, random, static_cast<uint16_t*>(values) + at);
    }
    if (how == Moments::kWide) {
      __builtin_memcpy(static_cast<float*>(values) + at, x, count * sizeof(float));
      return;
    }
    uint8_t* const to = static_cast<uint8_t*>(values) + at;
    uint8_t* const exponent = scale + at / kPackedBlock;
    if (is_signed) return keep_packed<PackedFirst, kRandom>(x, count, random, to, exponent);
    keep_packed<PackedSecond, kRandom>(x, count, random, to, exponent);
  }
};

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

template <class S>
AIM_CALLED void keep_weights(const Tensor& tensor, const Shared& shared, const float* from,
                             int64_t at, int64_t count) {
  S* const param = static_cast<S*>(tensor.param) + at;
  uint16_t* const upper = reinterpret_cast<uint16_t*>(param);
  uint16_t* const rest = static_cast<uint16_t*>(tensor.rest) + (tensor.rest ? at : 0);
  switch (static_cast<Weights>(tensor.weights)) {
    case Weights::kNearest:
      for (int64_t i = 0; i < count; ++i) param[i] = narrowed_to(from[i], S{});
      return;
    case Weights::kStochastic: {
      RoundingBits random;
      for (int64_t begin = 0; begin < count; begin += RoundingBits::kCount) {
        const int64_t size =
            count - begin < RoundingBits::kCount ? count - begin : RoundingBits::kCount;
        random.draw(shared, kWeightStream, tensor.first - tensor.offset,
                    tensor.offset + at + begin);
        for (int64_t i = 0; i < size; ++i) {
          upper[begin + i] =
              static_cast<uint16_t>(bfloat16_bits<true>(as_int(from[begin + i]), random.of[i]));
        }
      }
      return;
    }
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

// -- beside the update ---------------------------------------------------------------------------

template <class T>
AIM_INLINE void move_average(const Uniforms<T>& u, const T* theta, int64_t count, T* ema) {
  for (int64_t i = 0; i < count; ++i) ema[i] = ema[i] * u.ema_keep + theta[i] * u.ema_add;
}

}  // namespace AIM_ISA
}  // namespace aim
