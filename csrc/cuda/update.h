// The update kernels: one block steps one chunk of one tensor.
#pragma once

#include <type_traits>

#include "common/element.h"
#include "common/philox.h"
#include "cuda/block.h"
#include "cuda/emit.h"
#include "cuda/memory.h"

namespace aim {
namespace AIM_ISA {

// Vectors that a thread has in flight at a time: 64 (float64) to 128 bytes a thread, so that a
// quarter of a multiprocessor's threads covers the latency of its memory. More would spill
// registers; for their sake, too, the loops over vectors are not unrolled any further.
template <RuleVariant kVariant, class S, class T>
inline constexpr int kUnroll = sizeof(S) == 4 && !has_extra(kVariant) ? 2 : 1;

// Neighbouring elements in a thread's registers.
template <class T, int kCount>
struct Vector {
  T theta[kCount], grad[kCount], m[kCount], v[kCount];
};

// A thread's sums. Short: at most chunk_size / threads terms each.
template <class T>
struct Sums {
  T grad = 0, grad_sq = 0, update_sq = 0, param_sq = 0;
  int32_t under = 0;
};

// Where a thread's elements lie in a chunk: `width` of them from `first`, then again every
// `stride`, as far as they are in [0, end). 32 bits, since registers are scarce: pointers are moved
// to the chunk beforehand.
struct Run {
  int32_t first, end, stride;
};

__device__ __forceinline__ int elements(int64_t at, int64_t end, int most) {
  return end - at < most ? static_cast<int>(end - at) : most;
}

// The chunk begins `lead` elements behind the begin of a run's first `width`.
__device__ __forceinline__ Run run_of(int32_t end, int width, int lead) {
  return {static_cast<int32_t>(threadIdx.x) * width - lead, end,
          static_cast<int32_t>(blockDim.x) * width};
}

template <class T>
__device__ __forceinline__ void move(T*& pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  if (pointer) pointer = reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// The tensor from element `begin` on.
template <class S, class T>
__device__ __forceinline__ Tensor moved(Tensor t, int64_t begin) {
  constexpr int64_t kStorage = sizeof(S), kState = sizeof(T);
  move(t.param, begin * kStorage);
  move(t.grad, begin * kStorage);
  move(t.exp_avg, begin * kState);
  move(t.exp_avg_sq, begin * kState);
  move(t.extra, begin * kState);
  move(t.master, begin * kState);
  move(t.anchor, begin * kState);
  t.first += begin;
  return in_global(t);
}

template <RuleVariant kVariant, class T, int kCount>
__device__ __forceinline__ void load_moment(const void* moment, int32_t at, int count, bool aligned,
                                            T (&x)[kCount]) {
  if (may_lack(kVariant) && !moment) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = 0;
    return;
  }
  load(static_cast<const T*>(moment) + at, count, aligned, x);
}

template <RuleVariant kVariant, class T, int kCount>
__device__ __forceinline__ void store_moment(void* moment, int32_t at, int count, bool aligned,
                                             const T (&x)[kCount]) {
  if (may_lack(kVariant) && !moment) return;
  store(static_cast<T*>(moment) + at, count, aligned, x);
}

template <RuleVariant kVariant, class S, class T, int kCount>
__device__ __forceinline__ void load_vector(const Tensor& tensor, int32_t at, int count,
                                            bool aligned, Vector<T, kCount>& x) {
  load(static_cast<const S*>(tensor.grad) + at, count, aligned, x.grad);
  if constexpr (has_first(kVariant)) load_moment<kVariant>(tensor.exp_avg, at, count, aligned, x.m);
  if constexpr (has_second(kVariant))
    load_moment<kVariant>(tensor.exp_avg_sq, at, count, aligned, x.v);
  if (tensor.master) {
    load(static_cast<const T*>(tensor.master) + at, count, aligned, x.theta);
  } else {
    load(static_cast<const S*>(tensor.param) + at, count, aligned, x.theta);
  }
}

template <RuleVariant kVariant, bool kNoise, class S, class T, int kCount>
__device__ __forceinline__ void step_vector(const Uniforms<T>& u, const Tensor& tensor, int32_t at,
                                            int count, bool aligned, const T (&noise)[kCount],
                                            Vector<T, kCount>& x, Sums<T>& sums) {
  T live[kCount];
  // Not fetched ahead, as the others are: registers are scarce, and few rules have it.
  T w[kCount] = {};
  if constexpr (has_extra(kVariant)) load_moment<kVariant>(tensor.extra, at, count, aligned, w);
  // Where uniforms are in shared memory, the compiler would keep them in registers all the same.
  if constexpr (sizeof(T) == 8) asm volatile("" ::: "memory");
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    StepTerms<T> terms;
    accumulate<kVariant, false, kNoise>(u, x.theta[k], x.grad[k], x.m[k], x.v[k], w[k], noise[k],
                                        terms);
    const bool under = classify<kVariant, true>(u, x.m[k], x.v[k], terms);
    if constexpr (is_adam(kVariant)) terms.numerator = x.m[k];
    const T delta = apply<kVariant>(u, terms, w[k], x.theta[k]);
    live[k] = terms.live;
    if (k < count) {
      sums.grad += x.grad[k];
      sums.grad_sq += x.grad[k] * x.grad[k];
      sums.update_sq += delta * delta;
      sums.param_sq += x.theta[k] * x.theta[k];
      sums.under += under;
    }
  }
  if constexpr (has_first(kVariant))
    store_moment<kVariant>(tensor.exp_avg, at, count, aligned, x.m);
  if constexpr (has_second(kVariant))
    store_moment<kVariant>(tensor.exp_avg_sq, at, count, aligned, x.v);
  if constexpr (has_extra(kVariant)) store_moment<kVariant>(tensor.extra, at, count, aligned, w);
  S* const param = static_cast<S*>(tensor.param) + at;
  if (!tensor.master) {
    store(param, count, aligned, x.theta);
    return;
  }
  store(static_cast<T*>(tensor.master) + at, count, aligned, x.theta);
  T anchor[kCount] = {};
  if (tensor.anchor) load(static_cast<const T*>(tensor.anchor) + at, count, aligned, anchor);
#pragma unroll
  for (int k = 0; k < kCount; ++k) live[k] = live_weight(x.theta[k], anchor[k], live[k]);
  store(param, count, aligned, live);
}

// Elements that a thread steps together where there is noise: of the four that a draw yields, what
// its registers hold.
template <class T>
inline constexpr int kTogether = sizeof(T) == 4 ? 4 : 1;

// The normals of elements `index` and after, up to a multiple of kCount.
template <class T, int kCount>
__device__ __forceinline__ void draw(const Shared& shared, int64_t index, T (&noise)[kCount]) {
  float z[4];
  normal4(shared.seed, shared.counter, static_cast<uint64_t>(index) / 4, z);
  // An index into registers that is known only at run time would move them to memory.
  if (index & 1) z[0] = z[1], z[1] = z[2], z[2] = z[3];
  if (index & 2) z[0] = z[2], z[1] = z[3];
#pragma unroll
  for (int k = 0; k < kCount; ++k) noise[k] = z[k];
}

// For registers; float64 ones, which would fill them, are read where they are.
template <class T>
__device__ __forceinline__ decltype(auto) uniforms_as(const Shared& shared) {
  if constexpr (sizeof(T) == 8) {
    return (shared.u);
  } else {
    return rounded<T>(shared.u);
  }
}

// What the threads of a block measured of `count` elements.
template <RuleVariant kVariant, class T>
__device__ __forceinline__ void report(const Tensor& tensor, const Sums<T>& sums, double squares,
                                       double nonfinite, int32_t count, Statistics* partial) {
  const double mine[] = {
      static_cast<double>(sums.under),     static_cast<double>(sums.grad),     squares,
      static_cast<double>(sums.update_sq), static_cast<double>(sums.param_sq), nonfinite};
  const double total = sum_columns<cuda::kMostThreads>(mine);
  static_assert(offsetof(Statistics, nonfinite) == sizeof(double) * 6);
  double* const columns = reinterpret_cast<double*>(partial);
  if (threadIdx.x == 0) columns[0] = count;
  if (threadIdx.x < 6) {
    const bool classless = threadIdx.x == 0 && !has_classes(tensor, kVariant);
    columns[1 + threadIdx.x] = classless ? static_cast<double>(bits_float(0x7FC00000u)) : total;
  }
}

// Elements [begin, last) of a tensor that has a gradient. Thread 0's `shared` is there once all
// have arrived; the first loads are under way before that.
template <RuleVariant kVariant, class S, class T>
__device__ __forceinline__ void update_chunk(const Tensor& all, const Shared& shared, int64_t begin,
                                             int64_t last, Statistics* partial) {
  constexpr int kCount = kWidth<S>, kVectors = kUnroll<kVariant, S, T>, kDrawn = kTogether<T>;
  const Tensor tensor = moved<S, T>(all, begin);
  const int32_t end = static_cast<int32_t>(last - begin);
  const Run run = run_of(end, kCount, 0);
  const bool aligned = on_16_bytes(tensor);
  Vector<T, kCount> x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int32_t at = run.first + i * run.stride;
    if (at < end) load_vector<kVariant, S>(tensor, at, elements(at, end, kCount), aligned, x[i]);
  }
  __syncthreads();
  const Uniforms<T>& u = uniforms_as<T>(shared);
  const int lead = static_cast<int>(tensor.first % kDrawn);  // noise goes by global indices
  const T none[kCount] = {};
  Sums<T> sums;
  if (!shared.has_noise) {
#pragma unroll 1
    for (int32_t round = run.first; round < end; round += kVectors * run.stride) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int32_t at = round + i * run.stride;
        if (at >= end) break;
        step_vector<kVariant, false, S>(u, tensor, at, elements(at, end, kCount), aligned, none,
                                        x[i], sums);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int32_t at = round + (kVectors + i) * run.stride;
        if (at < end)
          load_vector<kVariant, S>(tensor, at, elements(at, end, kCount), aligned, x[i]);
      }
    }
  } else {
    const Run drawn = run_of(end, kDrawn, lead);
#pragma unroll 1
    for (int32_t at = drawn.first; at < end; at += drawn.stride) {
      const int32_t begin = at < 0 ? 0 : at;
      const int count = elements(begin, end, at + kDrawn - begin);
      const bool whole = aligned && lead == 0;
      Vector<T, kDrawn> vector;
      load_vector<kVariant, S>(tensor, begin, count, whole, vector);
      T noise[kDrawn];
      draw(shared, tensor.first + begin, noise);
      step_vector<kVariant, true, S>(u, tensor, begin, count, whole, noise, vector, sums);
    }
  }

  double squares = sums.grad_sq, nonfinite = 0;
  // Squares that leave the range of T, and gradients that are not finite: once more, in float64.
  if (squares - squares != 0 || (squares == 0 && sums.grad != 0)) {
    squares = 0;
    const int width = shared.has_noise ? kDrawn : kCount;
    const Run again = run_of(end, width, shared.has_noise ? lead : 0);
#pragma unroll 1
    for (int32_t at = again.first; at < end; at += again.stride) {
#pragma unroll 1
      for (int32_t i = at < 0 ? 0 : at; i < at + width && i < end; ++i) {
        const T g = wide(static_cast<const S*>(tensor.grad)[i]) * u.scale;
        nonfinite += g - g != T{0};
        squares += static_cast<double>(g) * g;
      }
    }
  }
  report<kVariant>(all, sums, squares, nonfinite, end, partial);
}

// The variants of a family.
template <class S, class T, cuda::Family kFamily>
__device__ __forceinline__ void update_variants(const Tensor& tensor, const Shared& shared,
                                                RuleVariant variant, int64_t begin, int64_t end,
                                                Statistics* partial) {
#define AIM_UPDATE(name)  \
  case RuleVariant::name: \
    return update_chunk<RuleVariant::name, S, T>(tensor, shared, begin, end, partial)
  if constexpr (kFamily == cuda::kAdamFamily) {
    switch (variant) {
      AIM_UPDATE(kAdam);
      default:
        break;
    }
  }
  if constexpr (kFamily == cuda::kSgdFamily) {
    switch (variant) {
      AIM_UPDATE(kSgd);
      AIM_UPDATE(kSgdMomentum);
      AIM_UPDATE(kSgdState);
      AIM_UPDATE(kSgdMomentumState);
      default:
        break;
    }
  }
  if constexpr (kFamily == cuda::kOtherFamily) {
    switch (variant) {
      AIM_UPDATE(kAmsgrad);
      AIM_UPDATE(kRms);
      AIM_UPDATE(kLion);
      default:
        break;
    }
  }
#undef AIM_UPDATE
}

__device__ __forceinline__ cuda::Family family_of(const Tensor& t, RuleVariant variant) {
  if (t.moments || t.weights || t.zero_grad || t.ema) return cuda::kPackedFamily;
  if (variant == RuleVariant::kAdam) return cuda::kAdamFamily;
  return variant == RuleVariant::kAmsgrad || may_lack(variant) ? cuda::kOtherFamily
                                                               : cuda::kSgdFamily;
}

// `Dispatch::takes` says which storage types and variants a kernel knows; a launch leaves chunks of
// others to another. `Dispatch::run` steps a chunk; `Dispatch::skip`, where `Dispatch::kPacked`,
// does what is left of a step that is skipped.
template <class Dispatch>
__device__ __forceinline__ void update_block(const cuda::Work& work) {
  __shared__ Shared shared;
  __shared__ Statistics unread;
  const bool skip = skipped(work);
  if (skip && !Dispatch::kPacked) return;
  if (blockIdx.x == 0 && threadIdx.x == 0 && !skip) {
    work.phases[0] = work.control->phase;
    work.phases[1] = draw_phase(*work.control);
  }
  if (blockIdx.x >= work.chunk_count) return;
  const cuda::Chunk chunk = work.chunks[blockIdx.x];
  const Tensor tensor = in_global(work.tensors[chunk.tensor]);
  const RuleVariant variant = variant_of(tensor, work.groups[tensor.group]);
  if (!Dispatch::takes(static_cast<DType>(tensor.dtype), family_of(tensor, variant))) return;
  const int64_t begin = static_cast<int64_t>(chunk.index) * work.chunk_size;
  const int64_t end = begin + elements(begin, tensor.numel, work.chunk_size);
  if constexpr (Dispatch::kPacked) {
    if (skip) return Dispatch::skip(tensor, begin, end);
  }
  if (adopts(tensor, work.rows[tensor.group])) {
    adopt_any(tensor, begin, end);
    __syncthreads();  // other threads may step what this one took over
  }
  Statistics* partial = work.partials + blockIdx.x;
  if (tensor.uncounted) {
    if (threadIdx.x == 0) *partial = Statistics{};
    partial = &unread;
  }
  if (tensor.grad || tensor.master) {
    if (threadIdx.x == 0) shared = uniforms_of(work, tensor);
  }
  if (tensor.grad) {
    Dispatch::run(tensor, shared, variant, begin, end, partial);
    return;
  }
  if (threadIdx.x == 0) *partial = Statistics{};
  if (!tensor.master) return;
  __syncthreads();
  emit_any<Dispatch::kPacked>(tensor, shared, begin, end);
}

}  // namespace AIM_ISA
}  // namespace aim
