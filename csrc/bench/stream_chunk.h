// The loops of the memory floor (bench/stream.h), for the instruction set of the including
// translation unit, beside whose kernels they stand only because it has the compiler's flags.
#pragma once

#include "bench/stream_table.h"
#include "cpu/vector.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace aim {
namespace AIM_ISA {

using bench::StreamArrays;

template <class V>
AIM_INLINE void accumulate_into(float* to, const V& x) {
  V y;
  __builtin_memcpy(&y, to, sizeof y);
  y += x;
  __builtin_memcpy(to, &y, sizeof y);
}

// Sixteen bytes at a time on every instruction set that has them: a cache line leaves the core
// whole all the same.
template <class V>
AIM_INLINE void store_past_caches(float* to, const V& x) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) >= 16) {
    float lanes[sizeof(V) / sizeof(float)];
    __builtin_memcpy(lanes, &x, sizeof x);
    for (unsigned i = 0; i < sizeof lanes / sizeof lanes[0]; i += 4) {
      _mm_stream_ps(to + i, _mm_loadu_ps(lanes + i));
    }
    return;
  }
#endif
  __builtin_memcpy(to, &x, sizeof x);
}

template <bool kLive, bool kNontemporal, class V>
void run_stream(const StreamArrays& arrays, int64_t begin, int64_t end, float factor) {
  const StreamArrays a = arrays;  // a copy: no store can change its pointers
  constexpr int kWidth = sizeof(V) / sizeof(float);
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    V x, theta;
    __builtin_memcpy(&x, a.grad + i, sizeof x);
    x *= factor;
    accumulate_into(a.m + i, x);
    accumulate_into(a.v + i, x);
    if (!kLive) {
      accumulate_into(a.param + i, x);
      continue;
    }
    __builtin_memcpy(&theta, a.master + i, sizeof theta);
    theta += x;
    __builtin_memcpy(a.master + i, &theta, sizeof theta);
    if (kNontemporal) {
      store_past_caches(a.param + i, theta);
    } else {
      __builtin_memcpy(a.param + i, &theta, sizeof theta);
    }
  }
  for (; i < end; ++i) {
    const float x = a.grad[i] * factor;
    a.m[i] += x;
    a.v[i] += x;
    if (kLive) {
      a.param[i] = a.master[i] += x;
    } else {
      a.param[i] += x;
    }
  }
}

inline void stream_arrays(const StreamArrays& a, bool live, bool nontemporal, float factor,
                          int64_t begin, int64_t end) {
  using V = Lanes<float>::Vector;
  if (!live) return run_stream<false, false, V>(a, begin, end, factor);
  const bool aligned = reinterpret_cast<uintptr_t>(a.param + begin) % 16 == 0;
  if (!nontemporal || !aligned) return run_stream<true, false, V>(a, begin, end, factor);
  run_stream<true, true, V>(a, begin, end, factor);
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

inline int32_t stream_run(char* run, bool reads, bool writes, int32_t add, int64_t begin,
                          int64_t end) {
  IntVector seen{};
  const auto added = splat<IntVector>(add);
  constexpr int64_t kSize = sizeof(IntVector);
  int64_t i = begin;
  if (!writes) {
    for (; i + kSize <= end; i += kSize) seen ^= load<IntVector>(run + i);
  } else if (reads) {
    for (; i + kSize <= end; i += kSize) store(run + i, load<IntVector>(run + i) + added);
  } else {
    for (; i + kSize <= end; i += kSize) store(run + i, added);
  }
  return first_lane(seen);
}

extern const bench::StreamTable kStreams;  // external linkage, whichever namespace this is
const bench::StreamTable kStreams = {stream_arrays, stream_run};

}  // namespace AIM_ISA
}  // namespace aim
