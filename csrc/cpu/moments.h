// Moments as they are stored, a vector at a time within one block of 128 elements: read, gathered
// while the new ones are computed, kept. begin() turns to a block, flush() settles what its new
// moments share once all are gathered, end() follows the last that is kept.
#pragma once

#include "cpu/codes.h"

namespace aim {
namespace AIM_ISA {

enum Which : int { kFirstMoment, kSecondMoment, kExtraMoment };

template <int kRandom>
AIM_INLINE bool rounds_at_random(bool asked) {
  return kRandom < 0 ? asked : kRandom == 1;
}

// As they are: for tensors whose weights or averages are better moved this way.
class WideMoments {
 public:
  using Any = WideMoments;  // what knows all that a tensor may ask for
  explicit WideMoments(const Tensor& t)
      : from_{static_cast<float*>(t.exp_avg), static_cast<float*>(t.exp_avg_sq),
              static_cast<float*>(t.extra)} {}

  static AIM_INLINE constexpr bool random() { return false; }
  AIM_INLINE void begin(Which which, int64_t at) { block_[which] = from_[which] + at; }
  AIM_INLINE FloatVector read(Which which, int i) const {
    return load<FloatVector>(block_[which] + i);
  }
  AIM_INLINE void gather(Which, FloatVector) {}
  AIM_INLINE void flush(Which, int64_t) {}
  AIM_INLINE void end(Which) const {}
  AIM_INLINE FloatVector keep(Which which, int i, FloatVector x, IntVector) {
    store(block_[which] + i, x);
    return x;
  }

 private:
  float* from_[3];
  float* block_[3] = {};
};

// kRandom: 0 rounds to nearest, 1 at random, -1 as the tensor asks.
template <int kRandom>
class BFloat16Moments {
 public:
  using Any = BFloat16Moments<-1>;
  explicit BFloat16Moments(const Tensor& t)
      : from_{static_cast<uint16_t*>(t.exp_avg), static_cast<uint16_t*>(t.exp_avg_sq),
              static_cast<uint16_t*>(t.extra)},
        random_(rounds_at_random<kRandom>(t.stochastic != 0)) {}

  AIM_INLINE bool random() const { return rounds_at_random<kRandom>(random_); }
  AIM_INLINE void begin(Which which, int64_t at) { block_[which] = from_[which] + at; }
  AIM_INLINE FloatVector read(Which which, int i) const {
    return as_float(from_small(block_[which] + i) << 16);
  }
  AIM_INLINE void gather(Which, FloatVector) {}
  AIM_INLINE void flush(Which, int64_t) {}
  AIM_INLINE void end(Which) const {}
  // Stores a new moment; returns the magnitude of what was stored, or that itself.
  AIM_INLINE FloatVector keep(Which which, int i, FloatVector x, IntVector bits) {
    const IntVector kept = random() ? bfloat16_bits<true>(x, bits) : bfloat16_bits<false>(x, bits);
    to_small((kept >> 16) & 0xFFFF, block_[which] + i);
    return as_float(kept);
  }

 private:
  uint16_t* from_[3];
  uint16_t* block_[3] = {};
  bool random_;
};

// Always rounded at random: to nearest, a moment that vanishes would stay at a few units, and one
// that grows slowly would not start. kSignedExtra: whether the third moment may be negative.
template <bool kSignedExtra>
class Int8Moments {
 public:
  using Any = Int8Moments;
  explicit Int8Moments(const Tensor& t)
      : from_{static_cast<uint8_t*>(t.exp_avg), static_cast<uint8_t*>(t.exp_avg_sq),
              static_cast<uint8_t*>(t.extra)},
        scale_{t.exp_avg_scale, t.exp_avg_sq_scale, t.extra_scale} {}

  static AIM_INLINE constexpr bool random() { return true; }

  AIM_INLINE void begin(Which which, int64_t at) {
    block_[which] = from_[which] + at;
    set_exponent(which, scale_[which][at / kPackedBlock]);
    greatest_[which] = IntVector{};
  }
  AIM_INLINE FloatVector read(Which which, int i) const {
    const uint8_t* const from = block_[which] + i;
    return has_sign(which) ? codes_[which].template read<PackedFirst>(from)
                           : codes_[which].template read<PackedSecond>(from);
  }
  // Every new moment of the block, before the first is kept.
  AIM_INLINE void gather(Which which, FloatVector x) {
    greatest_[which] = greater(as_int(x) & 0x7FFFFFFF, greatest_[which]);
  }
  AIM_INLINE void flush(Which which, int64_t at) {
    const int32_t greatest = greatest_lane(greatest_[which]);
    const int32_t exponent = has_sign(which) ? packed_exponent<PackedFirst>(greatest)
                                             : packed_exponent<PackedSecond>(greatest);
    scale_[which][at / kPackedBlock] = static_cast<uint8_t>(exponent);
    set_exponent(which, exponent);
  }
  // After the last moment of the block: of what is not finite, only the exponent tells.
  AIM_INLINE void end(Which which) const {
    if (!codes_[which].is_finite()) __builtin_memset(block_[which], 0, kPackedBlock);
  }
  AIM_INLINE FloatVector keep(Which which, int i, FloatVector x, IntVector bits) {
    uint8_t* const to = block_[which] + i;
    return has_sign(which) ? codes_[which].template keep<PackedFirst>(x, bits, to)
                           : codes_[which].template keep<PackedSecond>(x, bits, to);
  }

 private:
  static AIM_INLINE constexpr bool has_sign(Which which) {
    return which == kFirstMoment || (which == kExtraMoment && kSignedExtra);
  }
  AIM_INLINE void set_exponent(Which which, int32_t exponent) {
    has_sign(which) ? codes_[which].template set_exponent<PackedFirst>(exponent)
                    : codes_[which].template set_exponent<PackedSecond>(exponent);
  }

  uint8_t* from_[3];
  uint8_t* scale_[3];
  uint8_t* block_[3] = {};
  PackedCodes codes_[3];
  IntVector greatest_[3] = {};
};

}  // namespace AIM_ISA
}  // namespace aim
