// Numbers in fewer bits: moments as bfloat16 or in 8 bits, float32 weights as two halves. Whole
// numbers and exact float32 steps only, so that every device stores the same bits. V is a float or
// a vector of them, I the uint32 or vector of int32 that has the same bits.
//
// as_int() and as_float() must be declared for V and I before this header is included (scalar.h
// does it for float and uint32).
#pragma once

#include "common/convert.h"
#include "common/scalar.h"

namespace aim {
namespace AIM_ISA {

// A number as bfloat16 has it: bits of a float32 of which the lower half is zero. To nearest even,
// or, where `kRandom`, up with the probability of what is cut off (`random`: 16 bits). Infinities
// stay, since nothing is carried out of zeros; NaN stays quiet.
template <bool kRandom, class V, class I>
AIM_INLINE I bfloat16_bits(V x, I random) {
  const I bits = as_int(x);
  I increment = random;
  if constexpr (!kRandom) increment = ((bits >> 16) & 1) + 0x7FFF;
  return select(x != x, bits | 0x400000, bits + increment) & ~splat<I>(0xFFFF);
}

// -- 8 bits --------------------------------------------------------------------------------------
//
// A block of kPackedBlock elements shares an exponent, by its greatest magnitude, as float32 has it
// in its bits. An element is a small float relative to it: kBinades powers of two up to that one,
// kMantissa bits in each, the lowest binade linear down to zero. So powers of two scale exactly, a
// block that is stored and read again is stored as it was, and every value is a bfloat16 as well.
// The first moment has a sign; the second, whose root is divided by, has more binades instead, and
// is never stored as zero unless it is.
inline constexpr int kPackedMantissa = 4, kPackedShift = 23 - kPackedMantissa;

template <int kBinadeCount, bool kHasSign>
struct PackedFormat {
  static constexpr int kBinades = kBinadeCount;
  static constexpr bool kSigned = kHasSign;
  static constexpr int kMost = (kBinades << kPackedMantissa) - 1;  // the greatest code without sign
  static_assert((kMost + 1) << (kSigned ? 1 : 0) == 256);
};
using PackedFirst = PackedFormat<8, true>;
using PackedSecond = PackedFormat<16, false>;

// The exponent that a block stores, from the greatest bits of its magnitudes: one more where that
// lies above the greatest code, or nothing could grow past it. 255: something in the block is not
// finite (or nearly so), and all of it is read as NaN.
template <class Format>
AIM_INLINE int32_t packed_exponent(int32_t greatest) {
  const int32_t least = Format::kBinades - 1;
  if (greatest >= 0x7F800000) return 255;
  const int32_t exponent = (greatest + (1 << kPackedShift) - 1) >> 23;
  return exponent < least ? least : exponent;
}

// The bits of the smallest number above the linear binade.
template <class Format>
AIM_INLINE int32_t packed_lowest(int32_t exponent) {
  return (exponent - (Format::kBinades - 2)) << 23;
}

// The place of a magnitude on the line of codes, rounded to one, up with the probability of what is
// cut off (`random`: 16 bits): a code before it is shifted down by kPackedShift. `lowest` is
// packed_lowest() of a finite block.
template <class Format, class V, class I>
AIM_INLINE I packed_place(V magnitude, I lowest, I random) {
  const I bits = as_int(magnitude);
  // A sum lines up what lies in the linear binade: its step is that of the binade above.
  const I sum = as_int(magnitude + as_float(lowest));
  const I exact = select(bits < lowest, sum - lowest, bits - (lowest - 0x800000));
  const I place = (exact + (random << (kPackedShift - 16))) & ~splat<I>((1 << kPackedShift) - 1);
  if constexpr (Format::kSigned) return place;
  return select((place == 0) & (bits != 0), splat<I>(1 << kPackedShift), place);
}

// The magnitude at a place.
template <class V, class I>
AIM_INLINE V packed_magnitude(I place, I lowest) {
  const I bits = place + lowest;
  const auto linear = place < 0x800000;
  const V value = as_float(select(linear, bits, bits - 0x800000));
  return select(linear, value - as_float(lowest), value);
}

// The number of a code.
template <class Format, class V, class I>
AIM_INLINE V packed_value(I code, I lowest) {
  const V value = packed_magnitude<V>((code & Format::kMost) << kPackedShift, lowest);
  if constexpr (!Format::kSigned) return value;
  return as_float(as_int(value) | ((code & 0x80) << 24));
}

// Lower 8 bits: the code of a number whose magnitude is at a place.
template <class Format, class V, class I>
AIM_INLINE I packed_code(V x, I place) {
  const I code = place >> kPackedShift;
  if constexpr (!Format::kSigned) return code;
  return code | ((as_int(x) >> 24) & 0x80);
}

// -- float32 weights in two halves ----------------------------------------------------------------

// The upper half is the nearest bfloat16 (away from zero where two are as near), the lower one what
// is to be added to it, as bits: together they are `bits` again. NaN becomes quiet first.
template <class I>
AIM_INLINE void split_bits(I bits, I* upper, I* lower) {
  const auto nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  bits = select(nan, bits | 0x400000, bits);
  *upper = (select(nan, bits, bits + 0x8000) >> 16) & 0xFFFF;
  *lower = (bits - (*upper << 16)) & 0xFFFF;
}

template <class I>
AIM_INLINE I joined_bits(I upper, I lower) {
  // The lower half counts from -0x8000 to 0x7FFF; that of a NaN, which was not rounded, from 0.
  const I signed_lower = ((lower ^ 0x8000) - 0x8000);
  const auto nan = (upper & 0x7FFF) > 0x7F80;
  // Below zero there is nothing: where somebody has set the weight to zero, and not what belonged
  // to what it was, the sum would be a NaN.
  const auto stale = ((upper & 0x7FFF) == 0) & ((lower & 0x8000) != 0);
  return (upper << 16) + select(stale, I{}, select(nan, lower, signed_lower));
}

}  // namespace AIM_ISA
}  // namespace aim
