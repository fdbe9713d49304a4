// The update of tensors that keep numbers in fewer bits, an average, or no gradient: a warp steps
// rows of 128 elements, blocks of 8-bit moments among them.
//
// The class of an element is that of its stored moments, which are known once the whole block is:
// moments and direction, then storing, then the step.
#pragma once

#include "cuda/codec.h"
#include "cuda/update.h"

namespace aim {
namespace AIM_ISA {

// The tensor from element `begin`, the first of a block, on.
template <class S, class T>
__device__ __forceinline__ Tensor moved_packed(Tensor t, int64_t begin) {
  constexpr int64_t kStorage = sizeof(S), kState = sizeof(T);
  const Moments how = static_cast<Moments>(t.moments);
  const int64_t moment = how == Moments::kWide ? kState : how == Moments::kBFloat16 ? 2 : 1;
  move(t.param, begin * kStorage);
  move(t.grad, begin * kStorage);
  move(t.exp_avg, begin * moment);
  move(t.exp_avg_sq, begin * moment);
  move(t.extra, begin * moment);
  move(t.exp_avg_scale, begin / kPackedBlock);
  move(t.exp_avg_sq_scale, begin / kPackedBlock);
  move(t.extra_scale, begin / kPackedBlock);
  move(t.master, begin * kState);
  move(t.anchor, begin * kState);
  move(t.ema, begin * kState);
  move(t.rest, begin * 2);
  t.first += begin;
  t.offset += begin;
  return in_global(t);
}

// Whether every array may be accessed by kEach<T> elements at a time.
template <class S, class T>
__device__ __forceinline__ bool on_words(const Tensor& t) {
  const auto at = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
  const uint64_t stored = at(t.param) | at(t.grad), state = at(t.master) | at(t.anchor) | at(t.ema),
                 moments = at(t.exp_avg) | at(t.exp_avg_sq) | at(t.extra);
  const Moments how = static_cast<Moments>(t.moments);
  const uint64_t moment = how == Moments::kWide ? sizeof(T) : how == Moments::kBFloat16 ? 2 : 1;
  return stored % (kEach<T> * sizeof(S)) == 0 && state % (kEach<T> * sizeof(T)) == 0 &&
         moments % (kEach<T> * moment) == 0 && at(t.rest) % (kEach<T> * 2) == 0;
}

// The normals of kCount elements from global index `index` on, which may lie in two draws.
template <class T, int kCount>
__device__ __forceinline__ void draw_across(const Shared& shared, int64_t index,
                                            T (&noise)[kCount]) {
  float z[8];
  const uint64_t first = static_cast<uint64_t>(index) / 4;
  const int lead = static_cast<int>(index & 3);
  normal4(shared.seed, shared.counter, first, z);
  if (lead + kCount > 4) {
    normal4(shared.seed, shared.counter, first + 1, z + 4);
  } else {
    z[4] = z[5] = z[6] = z[7] = 0;
  }
  // An index into registers that is known only at run time would move them to memory.
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    noise[k] = lead == 0 ? z[k] : lead == 1 ? z[k + 1] : lead == 2 ? z[k + 2] : z[k + 3];
  }
}

// A thread's elements [at, at + count) of the row that begins at element `row`. The tensor's record
// is in shared memory: its pointers would fill a quarter of the registers.
template <RuleVariant kVariant, class S, class T>
__device__ __forceinline__ void step_row(const Uniforms<T>& u, const Tensor& record,
                                         const Shared& shared, int32_t row, int32_t at, int count,
                                         bool aligned, Sums<T>& sums) {
  constexpr int kCount = kEach<T>;
  // What is in shared memory, the compiler would keep in registers all the same.
  asm volatile("" ::: "memory");
  const Tensor tensor = in_global(record);
  using Third = std::conditional_t<kVariant == RuleVariant::kRms, PackedFirst, PackedSecond>;
  const StoredMoment first{tensor.exp_avg, tensor.exp_avg_scale},
      second{tensor.exp_avg_sq, tensor.exp_avg_sq_scale}, third{tensor.extra, tensor.extra_scale};
  const int32_t how = tensor.moments;
  // Known when this is compiled, but for the variants that may lack one.
  const bool keeps_m = has_first(kVariant) && (!may_lack(kVariant) || tensor.exp_avg),
             keeps_v = has_second(kVariant) && (!may_lack(kVariant) || tensor.exp_avg_sq),
             keeps_w = has_extra(kVariant) && (!may_lack(kVariant) || tensor.extra);
  T theta[kCount], grad[kCount], m[kCount] = {}, v[kCount] = {}, w[kCount] = {};
  fetch_wide(static_cast<const S*>(tensor.grad) + at, count, aligned, grad);
  read_weights<S>(tensor, at, count, aligned, theta);
  if (keeps_m) read_moment<PackedFirst>(first, how, at, count, aligned, m);
  if (keeps_v) read_moment<PackedSecond>(second, how, at, count, aligned, v);
  if (keeps_w) read_moment<Third>(third, how, at, count, aligned, w);
  StepTerms<T> terms[kCount];
  if (shared.has_noise) {
    T noise[kCount];
    draw_across(shared, tensor.first + at, noise);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      accumulate<kVariant, false, true>(u, theta[k], grad[k], m[k], v[k], w[k], noise[k], terms[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      accumulate<kVariant, false, false>(u, theta[k], grad[k], m[k], v[k], w[k], T{0}, terms[k]);
    }
  }
  if constexpr (is_adam(kVariant)) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) terms[k].numerator = m[k];
  }
  uint32_t random[kCount] = {};
  const bool stochastic = tensor.stochastic != 0;
  if constexpr (sizeof(T) == 4 && kVariant != RuleVariant::kSgd) {
    // 8 bits are always rounded at random.
    if (how == static_cast<int32_t>(Moments::kInt8) ||
        (how == static_cast<int32_t>(Moments::kBFloat16) && stochastic)) {
      rounding_row(shared, kMomentStream, tensor.first - tensor.offset, tensor.offset + row,
                   random);
    }
  }
  if (keeps_m) keep_moment<PackedFirst>(first, how, stochastic, random, at, count, aligned, m);
  if (keeps_v) keep_moment<PackedSecond>(second, how, stochastic, random, at, count, aligned, v);
  if (kVariant == RuleVariant::kAmsgrad)
    keep_moment<Third>(third, how, stochastic, random, at, count, aligned, w);

  T live[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const bool under = classify<kVariant, true>(u, m[k], v[k], terms[k]);
    const T delta = apply<kVariant>(u, terms[k], w[k], theta[k]);
    live[k] = terms[k].live;
    if (k < count) {
      sums.grad += grad[k];
      sums.grad_sq += grad[k] * grad[k];
      sums.update_sq += delta * delta;
      sums.param_sq += theta[k] * theta[k];
      sums.under += under;
    }
  }
  if (kVariant != RuleVariant::kAmsgrad && keeps_w)
    keep_moment<Third>(third, how, stochastic, random, at, count, aligned, w);
  if (tensor.ema) {
    T* const ema = static_cast<T*>(tensor.ema) + at;
    T average[kCount];
    fetch(ema, count, aligned, average);
#pragma unroll
    for (int k = 0; k < kCount; ++k) average[k] = average[k] * u.ema_keep + theta[k] * u.ema_add;
    put(ema, count, aligned, average);
  }
  if (!tensor.master) {
    return keep_weights<S>(tensor, shared, tensor.offset + row, at, count, aligned, theta);
  }
  put(static_cast<T*>(tensor.master) + at, count, aligned, theta);
  T anchor[kCount] = {};
  if (tensor.anchor) fetch(static_cast<const T*>(tensor.anchor) + at, count, aligned, anchor);
#pragma unroll
  for (int k = 0; k < kCount; ++k) live[k] = live_weight(theta[k], anchor[k], live[k]);
  put_narrow(static_cast<S*>(tensor.param) + at, count, aligned, live);
}

// Rows of a warp in a chunk: body(row, at, count) with the begin of the row, that of the thread's
// elements and how many there are, which may be less than 1. All of a warp take part in all rows.
template <class T, class Body>
__device__ __forceinline__ void for_each_row(int32_t end, const Body& body) {
  constexpr int kRow = kEach<T> * kWarp;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp,
                lane = static_cast<int32_t>(threadIdx.x) % kWarp,
                stride = static_cast<int32_t>(blockDim.x) * kEach<T>;
#pragma unroll 1
  for (int32_t row = warp * kRow; row < end; row += stride) {
    const int32_t at = row + lane * kEach<T>;
    body(row, at, end - at < kEach<T> ? end - at : kEach<T>);
  }
}

template <class S, class T>
__device__ __forceinline__ void clear_grad(const Tensor& tensor, int32_t end, bool aligned) {
  S* const grad = static_cast<S*>(in_global(tensor.grad));
  for_each_row<T>(end, [&](int32_t, int32_t at, int count) {
    const S zeros[kEach<T>] = {};
    put(grad + at, count, aligned, zeros);
  });
}

// The first `end` elements of a tensor that has a gradient.
template <RuleVariant kVariant, class S, class T>
__device__ __forceinline__ void update_packed(const Tensor& tensor, const Uniforms<T>& u,
                                              const Shared& shared, int32_t end,
                                              Statistics* partial) {
  const bool aligned = on_words<S, T>(tensor);
  Sums<T> sums;
  for_each_row<T>(end, [&](int32_t row, int32_t at, int count) {
    step_row<kVariant, S>(u, tensor, shared, row, at, count, aligned, sums);
  });
  double squares = sums.grad_sq, nonfinite = 0;
  // Squares that leave the range of T, and gradients that are not finite: once more, in float64.
  if (squares - squares != 0 || (squares == 0 && sums.grad != 0)) {
    squares = 0;
    const S* const grad = static_cast<const S*>(in_global(tensor.grad));
    for_each_row<T>(end, [&](int32_t, int32_t at, int count) {
#pragma unroll 1
      for (int32_t i = at; i < at + count; ++i) {
        const T g = wide(grad[i]) * u.scale;
        nonfinite += g - g != T{0};
        squares += static_cast<double>(g) * g;
      }
    });
  }
  if (tensor.zero_grad) clear_grad<S, T>(tensor, end, aligned);
  report<kVariant>(tensor, sums, squares, nonfinite, end, partial);
}

// A chunk of a step that is skipped.
template <class S, class T>
__device__ __forceinline__ void skip_packed(const Tensor& all, int64_t begin, int64_t last) {
  if (!all.grad || !all.zero_grad) return;
  const Tensor tensor = moved_packed<S, T>(all, begin);
  clear_grad<S, T>(tensor, static_cast<int32_t>(last - begin), on_words<S, T>(tensor));
}

// Elements [begin, last) of a tensor that has a gradient. Thread 0's `shared` is there once all
// have arrived.
template <class S, class T>
__device__ __forceinline__ void update_packed_variants(const Tensor& all, const Shared& shared,
                                                       RuleVariant variant, int64_t begin,
                                                       int64_t last, Statistics* partial) {
  __shared__ Tensor tensor;
  __shared__ Uniforms<T> u;
  if (threadIdx.x == 0) {
    tensor = moved_packed<S, T>(all, begin);
    u = rounded<T>(shared.u);
  }
  __syncthreads();
  const int32_t end = static_cast<int32_t>(last - begin);
#define AIM_UPDATE(name)  \
  case RuleVariant::name: \
    return update_packed<RuleVariant::name, S, T>(tensor, u, shared, end, partial)
  switch (variant) {
    AIM_UPDATE(kAdam);
    AIM_UPDATE(kAmsgrad);
    AIM_UPDATE(kSgd);
    AIM_UPDATE(kSgdMomentum);
    AIM_UPDATE(kSgdState);
    AIM_UPDATE(kSgdMomentumState);
    AIM_UPDATE(kRms);
    AIM_UPDATE(kLion);
  }
#undef AIM_UPDATE
}

}  // namespace AIM_ISA
}  // namespace aim
