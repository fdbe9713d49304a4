#include "aim/stream.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "aim/isa.h"
#include "common/platform.h"
#include "cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aim {
namespace {

struct Arrays {
  const float* grad;
  float *param, *m, *v, *master;
};

template <class V>
AIM_INLINE void add(float* to, const V& x) {
  V y;
  __builtin_memcpy(&y, to, sizeof y);
  y += x;
  __builtin_memcpy(to, &y, sizeof y);
}

// Sixteen bytes at a time on every instruction set: a cache line leaves the core whole all the
// same.
template <class V>
AIM_INLINE void store_past_caches(float* to, const V& x) {
#if defined(__x86_64__)
  float lanes[sizeof(V) / sizeof(float)];
  __builtin_memcpy(lanes, &x, sizeof x);
  for (unsigned i = 0; i < sizeof lanes / sizeof lanes[0]; i += 4) {
    _mm_stream_ps(to + i, _mm_loadu_ps(lanes + i));
  }
#else
  __builtin_memcpy(to, &x, sizeof x);
#endif
}

template <bool kLive, bool kNontemporal, class V>
AIM_INLINE void run(const Arrays& arrays, int64_t begin, int64_t end, float factor) {
  const Arrays a = arrays;  // a copy: no store can change its pointers
  constexpr int kWidth = sizeof(V) / sizeof(float);
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    V x, theta;
    __builtin_memcpy(&x, a.grad + i, sizeof x);
    x *= factor;
    add(a.m + i, x);
    add(a.v + i, x);
    if (!kLive) {
      add(a.param + i, x);
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

template <class V>
AIM_INLINE void run_plan(const Arrays& a, int64_t begin, int64_t end, const StreamPlan& plan,
                         float factor) {
  if (!plan.live) return run<false, false, V>(a, begin, end, factor);
  const bool aligned = reinterpret_cast<uintptr_t>(a.param + begin) % 16 == 0;
  if (!plan.nontemporal || !aligned) return run<true, false, V>(a, begin, end, factor);
  run<true, true, V>(a, begin, end, factor);
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <int kBytes>
struct VectorOf {
  typedef float type __attribute__((vector_size(kBytes)));
};

using Run = void (*)(const Arrays&, int64_t, int64_t, const StreamPlan&, float);

// Function attributes and not compiler flags: one loop does not need a translation unit per
// instruction set.
void run16(const Arrays& a, int64_t begin, int64_t end, const StreamPlan& plan, float factor) {
  run_plan<VectorOf<16>::type>(a, begin, end, plan, factor);
}
#if defined(__x86_64__)
__attribute__((target("avx2"))) void run32(const Arrays& a, int64_t begin, int64_t end,
                                           const StreamPlan& plan, float factor) {
  run_plan<VectorOf<32>::type>(a, begin, end, plan, factor);
}
__attribute__((target("avx512f"))) void run64(const Arrays& a, int64_t begin, int64_t end,
                                              const StreamPlan& plan, float factor) {
  run_plan<VectorOf<64>::type>(a, begin, end, plan, factor);
}
#endif

Run run_for(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) return run64;
  if (std::strcmp(isa, "avx2") == 0) return run32;
#endif
  (void)isa;
  return run16;
}

Status check(const Tensor* tensors, int64_t tensor_count, const StreamPlan& plan) {
  if (tensor_count < 0 || plan.chunk < 0) return Status::kBadSize;
  if (tensor_count && !tensors) return Status::kNullPointer;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if (static_cast<DType>(t.dtype) != DType::kFloat32) return Status::kBadDType;
    if (t.numel < 0) return Status::kBadSize;
    if (!t.param || !t.grad || !t.exp_avg || !t.exp_avg_sq || (plan.live && !t.master)) {
      return Status::kNullPointer;
    }
  }
  return Status::kOk;
}

}  // namespace

Status stream(const Tensor* tensors, int64_t tensor_count, const StreamPlan& plan, float factor,
              const Execution& execution) {
  Status status = check(tensors, tensor_count, plan);
  if (status != Status::kOk) return status;
  const char* isa;
  status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;
  const Run run = run_for(isa);

  // Tensors lie end to end on one line of elements, which tasks cut at equal lengths.
  std::vector<int64_t> starts(1, 0);
  for (int64_t i = 0; i < tensor_count; ++i) starts.push_back(starts.back() + tensors[i].numel);
  const int64_t total = starts.back(), threads = std::max(execution.threads, 1);
  const int64_t share = (total + threads - 1) / threads;
  // Cuts fall on cache lines, so that no two threads write the same one.
  const int64_t length = std::max<int64_t>(((plan.chunk ? plan.chunk : share) + 15) / 16 * 16, 16);
  for_each_task(execution, (total + length - 1) / length, [&](int64_t task) {
    const int64_t begin = task * length, end = std::min(begin + length, total);
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t at = begin; at < end; at = starts[++i]) {
      const Tensor& t = tensors[i];
      const Arrays a{static_cast<const float*>(t.grad), static_cast<float*>(t.param),
                     static_cast<float*>(t.exp_avg), static_cast<float*>(t.exp_avg_sq),
                     static_cast<float*>(t.master)};
      run(a, at - starts[i], std::min(end, starts[i + 1]) - starts[i], plan, factor);
    }
  });
  return Status::kOk;
}

}  // namespace aim
