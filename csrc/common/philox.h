// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", 2011) and normals by Box-Muller. Only +, -, *, / and sqrt on float32, so that every
// device draws the same bits.
#pragma once

#include "common/scalar.h"

namespace aim {
namespace AIM_ISA {

enum Stream : uint32_t { kNoiseStream = 0, kPhaseStream = 1, kMomentStream = 2, kWeightStream = 3 };

// Of noise and phases; and of rounding, which asks for less: seven are the fewest with which the
// authors found no statistical defect.
inline constexpr int kRounds = 10, kRoundingRounds = 7;

struct Philox4 {
  uint32_t x[4];
};

template <int kCount = kRounds>
AIM_INLINE Philox4 philox4x32(uint64_t seed, Philox4 c) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kCount; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c.x[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c.x[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.x[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.x[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

// Random bits make branches that no processor predicts, so choices below are made with masks.
AIM_INLINE uint32_t choose(bool first, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(first);
  return (a & mask) | (b & ~mask);
}

// ln(n * 2^-24) for 1 <= n <= 2^24. ln x = k ln 2 + 2 artanh(s), s = (m-1)/(m+1), with m in
// [1/sqrt 2, sqrt 2].
AIM_INLINE float log_fraction(uint32_t n) {
  uint32_t bits = float_bits(static_cast<float>(n));  // exact
  const int exponent = static_cast<int>(bits >> 23) - (127 + 24);
  bits = (bits & 0x7FFFFF) | 0x3F800000;      // m in [1, 2)
  const uint32_t above = bits >= 0x3FB504F3;  // sqrt 2
  const float m = bits_float(bits - (above << 23));
  const float k = static_cast<float>(exponent + static_cast<int>(above));
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  // Taylor's series of artanh(s)/s: |s| <= 0.1716, so the first term left out is below 3e-9.
  const float series = 1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
  return k * 0.693147181f + 2.0f * s * series;
}

// cos and sin of 2 pi n 2^-24: the top two bits are the quadrant, the rest an angle in [0, pi/2),
// folded to [0, pi/4].
AIM_INLINE void circle(uint32_t n, float* cosine, float* sine) {
  const uint32_t quadrant = n >> 22, rest = n & 0x3FFFFF;
  const bool folded = rest > 0x200000;
  const float a =
      static_cast<float>(choose(folded, 0x400000 - rest, rest)) * (6.28318531f / 16777216.0f);
  const float z = a * a;
  // Taylor's series; at pi/4 the first terms left out are below 4e-8.
  const uint32_t s = float_bits(
      a * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880))))));
  const uint32_t c =
      float_bits(1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320)))));
  // Folding exchanges sine and cosine, and so does every odd quadrant.
  const bool exchanged = folded != ((quadrant & 1) != 0);
  *cosine = bits_float(choose(exchanged, s, c) ^ (((quadrant + 1) >> 1 & 1) << 31));
  *sine = bits_float(choose(exchanged, c, s) ^ ((quadrant >> 1) << 31));
}

// Two independent standard normals from two 32-bit words (their upper 24 bits).
AIM_INLINE void normal_pair(uint32_t x0, uint32_t x1, float* z0, float* z1) {
  const float radius = square_root(-2.0f * log_fraction((x0 >> 8) + 1));
  float cosine, sine;
  circle(x1 >> 8, &cosine, &sine);
  *z0 = radius * cosine;
  *z1 = radius * sine;
}

// The normals of elements 4k .. 4k+3 in the step numbered `counter`.
AIM_INLINE void normal4(uint64_t seed, uint32_t counter, uint64_t k, float z[4]) {
  const Philox4 r = philox4x32(
      seed, {{static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32), counter, kNoiseStream}});
  normal_pair(r.x[0], r.x[1], &z[0], &z[1]);
  normal_pair(r.x[2], r.x[3], &z[2], &z[3]);
}

// Where the 16 bits lie that round an element, by its index in the whole parameter. Of 256
// neighbours, lane i of 16 belongs to draw i; the 16 that a lane has take the halves of the four
// words, and then what is left of 0xFFFF: a vector of draws is a vector of neighbours, and twice as
// many are had of each.
struct RoundingPlace {
  uint32_t draw;
  int word, shift;
  uint32_t flip;
};

AIM_INLINE RoundingPlace rounding_place(int64_t index) {
  const int within = static_cast<int>(index % 256), row = within / 16;
  return {static_cast<uint32_t>(index / 256) * 16 + static_cast<uint32_t>(within % 16), row % 4,
          row / 4 % 2 * 16, row < 8 ? 0u : 0xFFFFu};
}

// `base`: the global index of the whole parameter's first element, which tells parameters apart.
AIM_INLINE Philox4 rounding_counter(uint32_t draw, int64_t base, uint32_t counter, Stream stream) {
  const uint64_t place = static_cast<uint64_t>(base);
  return {{draw, static_cast<uint32_t>(place), counter,
           static_cast<uint32_t>(stream) | static_cast<uint32_t>(place >> 32) << 8}};
}

// 16 random bits, for the rounding of element `index` of that parameter in step `counter`.
AIM_INLINE uint32_t rounding_bits(uint64_t seed, uint32_t counter, Stream stream, int64_t base,
                                  int64_t index) {
  const RoundingPlace place = rounding_place(index);
  const Philox4 r =
      philox4x32<kRoundingRounds>(seed, rounding_counter(place.draw, base, counter, stream));
  const uint32_t low = place.word & 1 ? r.x[1] : r.x[0], high = place.word & 1 ? r.x[3] : r.x[2];
  return (((place.word & 2 ? high : low) >> place.shift) & 0xFFFF) ^ place.flip;
}

}  // namespace AIM_ISA
}  // namespace aim
