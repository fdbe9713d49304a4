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

// The bits of a bfloat16, in the lower half: to nearest even, or, where `kRandom`, up with the
// probability of what is cut off (`random`: 16 bits). Infinities stay, NaN stays quiet.
template <bool kRandom, class I>
AIM_INLINE I bfloat16_bits(I bits, I random) {
  I increment = random;
  if constexpr (!kRandom) increment = ((bits >> 16) & 1) + 0x7FFF;
  const I rounded = bits + increment, magnitude = bits & 0x7FFFFFFF;
  const I special = select(magnitude > 0x7F800000, bits | 0x400000, bits);
  return (select(magnitude >= 0x7F800000, special, rounded) >> 16) & 0xFFFF;
}

// -- 8 bits --------------------------------------------------------------------------------------
//
// A block of kPackedBlock elements shares an exponent, that of its greatest magnitude, as float32
// has it in its bits. An element is a small float relative to it: kBinades powers of two up to that
// one, kMantissa bits in each, the lowest binade linear down to zero. So powers of two scale
// exactly, a block that is stored and read again is stored as it was, and every value is a bfloat16
// as well. The first moment has a sign; the second, whose root is divided by, has more binades
// instead, and is never stored as zero unless it is.
template <int kMantissaBits, int kBinadeCount, bool kHasSign>
struct PackedFormat {
  static constexpr int kMantissa = kMantissaBits, kBinades = kBinadeCount;
  static constexpr bool kSigned = kHasSign;
  static constexpr int kShift = 23 - kMantissa;              // from float32's mantissa
  static constexpr int kMost = (kBinades << kMantissa) - 1;  // the greatest code without sign
  static_assert((kMost + 1) << (kSigned ? 1 : 0) == 256);
};
using PackedFirst = PackedFormat<4, 8, true>;
using PackedSecond = PackedFormat<3, 32, false>;

// The exponent that a block stores, from the greatest bits of its magnitudes. 255: something in it
// is not finite, and all of it is read as NaN.
template <class Format>
AIM_INLINE int32_t packed_exponent(int32_t greatest) {
  const int32_t exponent = greatest >> 23, least = Format::kBinades - 1;
  return exponent < least ? least : exponent;
}

// The bits of the lowest number that is not in the linear binade.
template <class Format>
AIM_INLINE int32_t packed_lowest(int32_t exponent) {
  return (exponent - (Format::kBinades - 2)) << 23;
}

// The code of a number, in the lower 8 bits; `lowest` is packed_lowest() of a finite block.
template <class Format, bool kRandom, class V, class I>
AIM_INLINE I packed_code(V x, I lowest, V lowest_float, I random) {
  const I bits = as_int(x), magnitude = bits & 0x7FFFFFFF;
  // A sum lines up what lies in the linear binade: its step is that of the binade above.
  const I linear = as_int(as_float(magnitude) + lowest_float) - lowest;
  const I place = select(magnitude < lowest, linear, magnitude - lowest + 0x800000);
  constexpr int kSpare = Format::kShift - 16;
  I increment = splat<I>(1 << (Format::kShift - 1));
  if constexpr (kRandom) increment = random << kSpare;
  I code = (place + increment) >> Format::kShift;
  code = select(code > Format::kMost, splat<I>(Format::kMost), code);
  if constexpr (Format::kSigned) return code | ((bits >> 24) & 0x80);
  return select((code == 0) & (magnitude != 0), splat<I>(1), code);
}

// The number of a code of a finite block.
template <class Format, class V, class I>
AIM_INLINE V packed_value(I code, I lowest, V lowest_float) {
  const I magnitude = code & Format::kMost, place = magnitude << Format::kShift;
  const auto linear = magnitude < (1 << Format::kMantissa);
  const V above = as_float(place + lowest - select(linear, I{}, splat<I>(0x800000)));
  const V value = above - select(linear, lowest_float, V{});
  if constexpr (!Format::kSigned) return value;
  return as_float(as_int(value) | ((code & 0x80) << 24));
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
  return (upper << 16) + select(nan, lower, signed_lower);
}

}  // namespace AIM_ISA
}  // namespace aim
