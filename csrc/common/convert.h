// 16-bit storage types, as bits: exact widening, round-to-nearest-even narrowing, NaN kept quiet.
#pragma once

#include "common/scalar.h"

namespace aim {
namespace AIM_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

AIM_INLINE uint32_t bits_of(float x) { return float_bits(x); }
AIM_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
AIM_INLINE uint16_t bits_of(BFloat16 x) { return x.bits; }
AIM_INLINE uint16_t bits_of(Float16 x) { return x.bits; }

AIM_INLINE float widen(BFloat16 x) { return bits_float(uint32_t{x.bits} << 16); }

AIM_INLINE BFloat16 narrow(float x, BFloat16) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return {static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16)};
}

AIM_INLINE float widen(Float16 x) {
  // Moves exponent and fraction to their places in a float32; a multiplication by 2^112 mends the
  // bias and makes subnormals normal. Infinities and NaN take the all-ones exponent (and NaN its
  // quiet bit, as the hardware's conversion does).
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = uint32_t{x.bits & 0x7FFFu} << 13;
  const uint32_t special = 0x7F800000u | (rest & 0x7FFFFFu) | ((rest & 0x7FFFFFu) ? 0x400000u : 0u);
  const uint32_t finite = float_bits(bits_float(rest) * 5.192296858534828e33f);  // 2^112
  return bits_float(sign | (rest >= 0x0F800000u ? special : finite));
}

AIM_INLINE Float16 narrow(float x, Float16) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
  // Subnormal results: adding 0.5 lets the float32 adder round the fraction at 2^-24.
  const uint32_t small = float_bits(bits_float(rest) + 0.5f) - 0x3F000000u;
  // Normal results: change the bias, round to nearest even at bit 13.
  const uint32_t normal = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t nan = 0x7E00u | ((rest >> 13) & 0x3FFu);
  const uint32_t magnitude = rest > 0x7F800000u    ? nan
                             : rest >= 0x477FF000u ? 0x7C00u  // rounds to infinity
                             : rest < 0x38800000u  ? small
                                                   : normal;
  return {static_cast<uint16_t>(sign | magnitude)};
}

}  // namespace AIM_ISA
}  // namespace aim
