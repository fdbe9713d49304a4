// The update kernels: one block steps one chunk of one tensor.
#pragma once

#include "common/element.h"
#include "common/philox.h"
#include "cuda/block.h"
#include "cuda/emit.h"
#include "cuda/memory.h"

namespace aim {
namespace AIM_ISA {

// Vectors that a thread has in flight at a time: 96 to 128 bytes a thread, so that a quarter of a
// multiprocessor's threads covers the latency of its memory. More would spill registers.
template <class S, class T>
inline constexpr int kUnroll = sizeof(S) == 4 ? 2 : 1;

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

// Where a thread's elements lie: `count` of them from `first`, then again every `stride`, up to
// `end`.
struct Run {
  int64_t first, end, stride;
};

__device__ __forceinline__ int elements(int64_t at, int64_t end, int most) {
  return end - at < most ? static_cast<int>(end - at) : most;
}

__device__ __forceinline__ Run run_of(int64_t begin, int64_t end, int count) {
  return {begin + static_cast<int64_t>(threadIdx.x) * count, end,
          static_cast<int64_t>(blockDim.x) * count};
}

template <Kind kKind, class S, class T, int kCount>
__device__ __forceinline__ void load_vector(const Tensor& tensor, int64_t at, int count,
                                            bool aligned, Vector<T, kCount>& x) {
  load(static_cast<const S*>(tensor.grad) + at, count, aligned, x.grad);
  if constexpr (has_first(kKind))
    load(static_cast<const T*>(tensor.exp_avg) + at, count, aligned, x.m);
  if constexpr (has_second(kKind))
    load(static_cast<const T*>(tensor.exp_avg_sq) + at, count, aligned, x.v);
  if (tensor.master) {
    load(static_cast<const T*>(tensor.master) + at, count, aligned, x.theta);
  } else {
    load(static_cast<const S*>(tensor.param) + at, count, aligned, x.theta);
  }
}

template <Kind kKind, bool kNoise, class S, class T, int kCount>
__device__ __forceinline__ void step_vector(const Uniforms<T>& u, const Tensor& tensor, int64_t at,
                                            int count, bool aligned, T noise, Vector<T, kCount>& x,
                                            Sums<T>& sums) {
  T live[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    Between<T> between;
    const bool under = accumulate<kKind, false, kNoise, true>(u, x.theta[k], x.grad[k], x.m[k],
                                                              x.v[k], noise, between);
    if constexpr (kKind == Kind::kAdam) between.numerator = x.m[k];
    const T delta = apply<kKind>(u, between, x.theta[k]);
    live[k] = between.live;
    if (k < count) {
      sums.grad += x.grad[k];
      sums.grad_sq += x.grad[k] * x.grad[k];
      sums.update_sq += delta * delta;
      sums.param_sq += x.theta[k] * x.theta[k];
      sums.under += under;
    }
  }
  if constexpr (has_first(kKind)) store(static_cast<T*>(tensor.exp_avg) + at, count, aligned, x.m);
  if constexpr (has_second(kKind))
    store(static_cast<T*>(tensor.exp_avg_sq) + at, count, aligned, x.v);
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

// The normal of one element, by its global index.
__device__ __forceinline__ float normal_of(const Shared& shared, int64_t index) {
  float z[4];
  normal4(shared.seed, shared.counter, static_cast<uint64_t>(index) / 4, z);
  const int lane = static_cast<int>(index & 3);  // an index into registers, known only at run time
  return lane == 0 ? z[0] : lane == 1 ? z[1] : lane == 2 ? z[2] : z[3];
}

// Elements [begin, end) of a tensor that has a gradient. Thread 0's `shared` is there once all have
// arrived; the first loads are under way before that.
template <Kind kKind, class S, class T>
__device__ __forceinline__ void update_chunk(const Tensor& tensor, const Shared& shared,
                                             int64_t begin, int64_t end, Statistics* partial) {
  constexpr int kCount = kWidth<S>, kVectors = kUnroll<S, T>;
  const Run run = run_of(begin, end, kCount);
  const bool aligned = on_16_bytes(tensor);
  Vector<T, kCount> x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = run.first + i * run.stride;
    if (at < end) load_vector<kKind, S>(tensor, at, elements(at, end, kCount), aligned, x[i]);
  }
  __syncthreads();
  const Uniforms<T> u = rounded<T>(shared.u);
  Sums<T> sums;
  if (!shared.has_noise) {
    for (int64_t round = run.first; round < end; round += kVectors * run.stride) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = round + i * run.stride;
        if (at >= end) break;
        step_vector<kKind, false, S>(u, tensor, at, elements(at, end, kCount), aligned, T{0}, x[i],
                                     sums);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = round + (kVectors + i) * run.stride;
        if (at < end) load_vector<kKind, S>(tensor, at, elements(at, end, kCount), aligned, x[i]);
      }
    }
  } else {
    // Drawing costs far more than moving: one element at a time, which keeps the code small.
    const Run single = run_of(begin, end, 1);
    for (int64_t at = single.first; at < end; at += single.stride) {
      Vector<T, 1> one;
      load_vector<kKind, S>(tensor, at, 1, false, one);
      const T noise = normal_of(shared, tensor.first + at);
      step_vector<kKind, true, S>(u, tensor, at, 1, false, noise, one, sums);
    }
  }

  double squares = sums.grad_sq, nonfinite = 0;
  // Squares that leave the range of T, and gradients that are not finite: once more, in float64.
  if (squares - squares != 0 || (squares == 0 && sums.grad != 0)) {
    squares = 0;
    const int width = shared.has_noise ? 1 : kCount;
    const Run again = run_of(begin, end, width);
    for (int64_t at = again.first; at < end; at += again.stride) {
      const int count = elements(at, end, width);
      for (int k = 0; k < count; ++k) {
        const T g = wide(static_cast<const S*>(tensor.grad)[at + k]) * u.scale;
        nonfinite += g - g != T{0};
        squares += static_cast<double>(g) * g;
      }
    }
  }
  const double mine[] = {
      static_cast<double>(sums.under),     static_cast<double>(sums.grad),     squares,
      static_cast<double>(sums.update_sq), static_cast<double>(sums.param_sq), nonfinite};
  const double total = sum_columns<cuda::kMostThreads>(mine);
  static_assert(offsetof(Statistics, nonfinite) == sizeof(double) * 6);
  double* const columns = reinterpret_cast<double*>(partial);
  if (threadIdx.x == 0) columns[0] = static_cast<double>(end - begin);
  if (threadIdx.x < 6) {
    const bool classless = threadIdx.x == 0 && !has_second(kKind);
    columns[1 + threadIdx.x] = classless ? static_cast<double>(bits_float(0x7FC00000u)) : total;
  }
}

template <class S, class T, bool kAdam, bool kSgd>
__device__ __forceinline__ void update_kinds(const Tensor& tensor, const Shared& shared, Kind kind,
                                             int64_t begin, int64_t end, Statistics* partial) {
  if constexpr (kAdam) {
    if (kind == Kind::kAdam)
      return update_chunk<Kind::kAdam, S, T>(tensor, shared, begin, end, partial);
  }
  if constexpr (kSgd) {
    switch (kind) {
      case Kind::kSgd:
        return update_chunk<Kind::kSgd, S, T>(tensor, shared, begin, end, partial);
      case Kind::kSgdMomentum:
        return update_chunk<Kind::kSgdMomentum, S, T>(tensor, shared, begin, end, partial);
      case Kind::kSgdState:
        return update_chunk<Kind::kSgdState, S, T>(tensor, shared, begin, end, partial);
      case Kind::kSgdMomentumState:
        return update_chunk<Kind::kSgdMomentumState, S, T>(tensor, shared, begin, end, partial);
      default:
        return;
    }
  }
}

// `Dispatch::run` steps a chunk; it knows which storage types and rules there are.
template <class Dispatch>
__device__ __forceinline__ void update_block(const cuda::Work& work) {
  __shared__ Shared shared;
  if (skipped(work)) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) *work.next = draw_phase(*work.control);
  if (blockIdx.x >= work.chunk_count) return;
  const cuda::Chunk chunk = work.chunks[blockIdx.x];
  const Tensor tensor = in_global(work.tensors[chunk.tensor]);
  const int64_t begin = static_cast<int64_t>(chunk.index) * work.chunk_size;
  const int64_t end = begin + elements(begin, tensor.numel, work.chunk_size);
  Statistics* const partial = work.partials + blockIdx.x;
  if (tensor.grad || tensor.master) {
    if (threadIdx.x == 0) shared = uniforms_of(work, tensor);
  }
  if (tensor.grad) {
    Dispatch::run(tensor, shared, kind_of(tensor, work.groups[tensor.group]), begin, end, partial);
    return;
  }
  if (threadIdx.x == 0) *partial = Statistics{};
  if (!tensor.master) return;
  __syncthreads();
  emit_any(tensor, shared, begin, end);
}

}  // namespace AIM_ISA
}  // namespace aim
