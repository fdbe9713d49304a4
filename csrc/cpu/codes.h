// Moments in 8 bits, a vector at a time: what a block's exponent makes of codes, and of numbers.
#pragma once

#include "cpu/codec.h"

namespace aim {
namespace AIM_ISA {

#if defined(AIM_VECTOR_BYTES) && AIM_VECTOR_BYTES == 64 && defined(__AVX512F__)

// What packed_place(), packed_magnitude() and packed_code() of common/packing.h compute, in fewer
// instructions.
class PackedCodes {
 public:
  template <class Format>
  AIM_INLINE void set_exponent(int32_t exponent) {
    lowest_ = _mm512_set1_epi32(packed_lowest<Format>(exponent));
    below_ = _mm512_sub_epi32(lowest_, _mm512_set1_epi32(0x800000));
    finite_ = exponent == 255 ? 0 : 0xFFFF;
    const __m512i places = _mm512_slli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), kPackedShift);
    // A difference, which is +0 for code 0 under the exponent of new states, too.
    linear_ = _mm512_castps_si512(_mm512_mask_sub_ps(
        _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)), finite_,
        _mm512_castsi512_ps(_mm512_add_epi32(places, lowest_)), _mm512_castsi512_ps(lowest_)));
  }

  AIM_INLINE bool is_finite() const { return finite_ != 0; }

  template <class Format>
  AIM_INLINE FloatVector read(const uint8_t* from) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (Format::kSigned) {
      const __m512i code = _mm512_maskz_cvtepi8_epi32(finite_, bytes);
      const __m512i place = _mm512_and_si512(_mm512_slli_epi32(code, kPackedShift),
                                             _mm512_set1_epi32(Format::kMost << kPackedShift));
      const __mmask16 is_linear = _mm512_testn_epi32_mask(code, _mm512_set1_epi32(kAboveLinear));
      // 0xF8: the magnitude, or the sign bit of the code, which was drawn out to 32 bits.
      return (FloatVector)_mm512_ternarylogic_epi32(magnitude(is_linear, code, place), code,
                                                    _mm512_set1_epi32(INT32_MIN), 0xF8);
    } else {
      const __m512i code = _mm512_maskz_cvtepu8_epi32(finite_, bytes);
      const __mmask16 is_linear = _mm512_cmplt_epi32_mask(code, _mm512_set1_epi32(16));
      return (FloatVector)magnitude(is_linear, code, _mm512_slli_epi32(code, kPackedShift));
    }
  }

  // Stores a number; returns the magnitude of what was stored.
  template <class Format>
  AIM_INLINE FloatVector keep(FloatVector x, IntVector random, uint8_t* to) const {
    const __m512i one = _mm512_set1_epi32(1 << kPackedShift);
    const __m512i bits = _mm512_and_si512((__m512i)x, _mm512_set1_epi32(INT32_MAX));
    const __m512i sum =
        _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(lowest_)));
    // Either is right on its side of `lowest_`, and the lesser one on the other.
    const __m512i exact =
        _mm512_max_epi32(_mm512_sub_epi32(sum, lowest_), _mm512_sub_epi32(bits, below_));
    __m512i place = _mm512_add_epi32(exact, _mm512_slli_epi32((__m512i)random, kPackedShift - 16));
    if constexpr (!Format::kSigned) {
      place = _mm512_mask_max_epi32(place, _mm512_test_epi32_mask(bits, bits), place, one);
    }
    // In a block that is not finite all are the first number, which is a NaN there.
    place = _mm512_maskz_and_epi32(finite_, place, _mm512_set1_epi32(-(1 << kPackedShift)));
    const __m512i magnitude_code = _mm512_srli_epi32(place, kPackedShift);
    __m512i code = magnitude_code;
    if constexpr (Format::kSigned) {
      code = _mm512_ternarylogic_epi32(code, _mm512_srli_epi32((__m512i)x, 24),
                                       _mm512_set1_epi32(0x80), 0xF8);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(code));
    const __mmask16 is_linear = _mm512_cmplt_epi32_mask(place, _mm512_set1_epi32(0x800000));
    return (FloatVector)magnitude(is_linear, magnitude_code, place);
  }

 private:
  static constexpr int kAboveLinear = 0x70;

  // Sixteen numbers are linear, as many as there are lanes to look them up in.
  AIM_INLINE __m512i magnitude(__mmask16 is_linear, __m512i code, __m512i place) const {
    return _mm512_mask_permutexvar_epi32(_mm512_add_epi32(place, below_), is_linear, code, linear_);
  }

  __m512i lowest_{}, below_{}, linear_{};
  __mmask16 finite_ = 0;
};

#else

class PackedCodes {
 public:
  template <class Format>
  AIM_INLINE void set_exponent(int32_t exponent) {
    lowest_ = splat<IntVector>(packed_lowest<Format>(exponent));
    poison_ = splat<IntVector>(exponent == 255 ? 0x7FC00000 : 0);
  }

  AIM_INLINE bool is_finite() const { return first_lane(poison_) == 0; }

  template <class Format>
  AIM_INLINE FloatVector read(const uint8_t* from) const {
    return with_poison(packed_value<Format, FloatVector>(from_small(from), lowest_));
  }

  // Stores a number; returns the magnitude of what was stored.
  template <class Format>
  AIM_INLINE FloatVector keep(FloatVector x, IntVector random, uint8_t* to) const {
    const FloatVector magnitude = as_float(as_int(x) & 0x7FFFFFFF);
    const IntVector place = packed_place<Format>(magnitude, lowest_, random);
    to_small(packed_code<Format>(x, place), to);
    return with_poison(packed_magnitude<FloatVector>(place, lowest_));
  }

 private:
  // Without a branch in the loops.
  AIM_INLINE FloatVector with_poison(FloatVector x) const { return as_float(as_int(x) | poison_); }

  IntVector lowest_{}, poison_{};
};

#endif

}  // namespace AIM_ISA
}  // namespace aim
