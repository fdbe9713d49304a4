// The random bits that round moments and weights (common/philox.h), a block of 128 at a time: every
// lane of a vector is a draw.
#pragma once

#include "common/shared.h"
#include "cpu/vector.h"

namespace aim {
namespace AIM_ISA {

#if defined(AIM_VECTOR_BYTES) && ((AIM_VECTOR_BYTES == 64 && defined(__AVX512F__)) || \
                                  (AIM_VECTOR_BYTES == 32 && defined(__AVX2__)))
// Lanes 0, 2, 4, ... times a number, as whole products in the place of two lanes each.
#if AIM_VECTOR_BYTES == 64
AIM_INLINE IntVector even_products(IntVector x, uint32_t by) {
  return (IntVector)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
}
// Lanes 1, 3, 5, ... in the place of those before them; and both together again.
AIM_INLINE IntVector odd_lanes(IntVector x) { return (IntVector)_mm512_srli_epi64((__m512i)x, 32); }
AIM_INLINE IntVector joined_lanes(IntVector even, IntVector odd) {
  return (IntVector)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even,
                                            _mm512_slli_epi64((__m512i)odd, 32));
}
#else
AIM_INLINE IntVector even_products(IntVector x, uint32_t by) {
  return (IntVector)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
}
AIM_INLINE IntVector odd_lanes(IntVector x) { return (IntVector)_mm256_srli_epi64((__m256i)x, 32); }
AIM_INLINE IntVector joined_lanes(IntVector even, IntVector odd) {
  return (IntVector)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
}
#endif

// philox4x32<kRoundingRounds>() of the counters `c`, lane by lane. Even and odd lanes apart: the
// lower half of a product is where it is wanted, and nobody looks at what is above it.
AIM_INLINE void rounding_lanes(uint64_t seed, IntVector (&c)[4]) {
  IntVector halves[2][4];
  for (int word = 0; word < 4; ++word) {
    halves[0][word] = c[word];
    halves[1][word] = odd_lanes(c[word]);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRoundingRounds; ++round) {
    for (auto& x : halves) {
      const IntVector product0 = even_products(x[0], 0xD2511F53);
      const IntVector product1 = even_products(x[2], 0xCD9E8D57);
      x[0] = odd_lanes(product1) ^ x[1] ^ splat<IntVector>(static_cast<int32_t>(k0));
      x[1] = product1;
      x[2] = odd_lanes(product0) ^ x[3] ^ splat<IntVector>(static_cast<int32_t>(k1));
      x[3] = product0;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int word = 0; word < 4; ++word) c[word] = joined_lanes(halves[0][word], halves[1][word]);
}
#else
// High and low halves of the products of 32-bit lanes with a number.
#if defined(AIM_VECTOR_BYTES)
AIM_INLINE void multiply_lanes(IntVector x, uint32_t by, IntVector* high, IntVector* low) {
  for (unsigned lane = 0; lane < sizeof x / sizeof x[0]; ++lane) {
    const uint64_t product = uint64_t{static_cast<uint32_t>(x[lane])} * by;
    (*high)[lane] = static_cast<int32_t>(product >> 32);
    (*low)[lane] = static_cast<int32_t>(product);
  }
}
#else
AIM_INLINE void multiply_lanes(uint32_t x, uint32_t by, uint32_t* high, uint32_t* low) {
  const uint64_t product = uint64_t{x} * by;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
}
#endif

// philox4x32<kRoundingRounds>() of the counters `c`, lane by lane.
AIM_INLINE void rounding_lanes(uint64_t seed, IntVector (&c)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRoundingRounds; ++round) {
    IntVector high0, low0, high1, low1;
    multiply_lanes(c[0], 0xD2511F53, &high0, &low0);
    multiply_lanes(c[2], 0xCD9E8D57, &high1, &low1);
    c[0] = high1 ^ c[1] ^ splat<IntVector>(static_cast<int32_t>(k0));
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ splat<IntVector>(static_cast<int32_t>(k1));
    c[3] = low0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}
#endif

// The bits of one parameter's elements, drawn for 256 of them at a time.
class RoundingBits {
 public:
  static constexpr int kCount = 128;

  // Of 128 elements from `index` on (an index in the whole parameter).
  AIM_INLINE const uint32_t* of_block(const Shared& shared, Stream stream, int64_t base,
                                      int64_t index) {
    if (index % kCount != 0) {
      one_by_one(shared, stream, base, index);
      return bits_;
    }
    const int64_t draws = index / (2 * kCount);
    if (draws != drawn_) {
      draw(shared, stream, base, draws);
      drawn_ = draws;
    }
    return bits_ + index % (2 * kCount);
  }

 private:
  __attribute__((noinline)) void one_by_one(const Shared& shared, Stream stream, int64_t base,
                                            int64_t index) {
    for (int i = 0; i < kCount; ++i) {
      bits_[i] = rounding_bits(shared.seed, shared.counter, stream, base, index + i);
    }
    drawn_ = -1;
  }

  __attribute__((noinline)) void draw(const Shared& shared, Stream stream, int64_t base,
                                      int64_t draws) {
    constexpr int kWidth = Lanes<float>::kCount;
    const Philox4 first =
        rounding_counter(static_cast<uint32_t>(draws) * 16, base, shared.counter, stream);
    for (int lane = 0; lane < 16; lane += kWidth) {
      IntVector c[4];
      for (int word = 0; word < 4; ++word) {
        c[word] = splat<IntVector>(static_cast<int32_t>(first.x[word]));
      }
      c[0] += lane_numbers() + lane;
      rounding_lanes(shared.seed, c);
      for (int row = 0; row < 8; ++row) {
        const IntVector bits = (c[row % 4] >> (row / 4 * 16)) & 0xFFFF;
        store(bits_ + row * 16 + lane, bits);
        store(bits_ + kCount + row * 16 + lane, bits ^ 0xFFFF);
      }
    }
  }

  static AIM_INLINE IntVector lane_numbers() {
    IntVector numbers{};
#ifdef AIM_VECTOR_BYTES
    for (int lane = 0; lane < Lanes<float>::kCount; ++lane) numbers[lane] = lane;
#endif
    return numbers;
  }

  alignas(64) uint32_t bits_[2 * kCount];
  int64_t drawn_ = -1;
};

}  // namespace AIM_ISA
}  // namespace aim
