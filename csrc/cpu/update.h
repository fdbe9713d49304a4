// One chunk of the step, for the instruction set of the including translation unit. Three pieces:
// arithmetic on registers (common/element.h), loads and stores (here), chunks and threads
// (step.cpp).
//
// Statistics are summed in 16 lanes (element i into lane i % 16) whatever the vector width, and
// lanes are added in a fixed order: every instruction set gives the same bits.
#pragma once

#include "cpu/codec.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"
// after vector.h, whose square roots it uses
#include "common/convert.h"
#include "common/element.h"
#include "common/philox.h"

namespace aim {
namespace AIM_ISA {

constexpr int kLanes = 16;
constexpr int64_t kBlock = 128;
// Elements between two additions of float32 sums to float64 ones. Where types are converted, three
// buffers of that many elements have to stay in the first-level cache.
constexpr int64_t kTile = 4096, kConvertedTile = 1024;

// Contiguous runs of the arithmetic type; where storage has the same type they are the tensor's own
// memory.
template <class T>
struct Tile {
  const T* theta_in;
  T* theta_out;
  const T* grad;
  T* m;
  T* v;
  T* w;
  T* live;
  const T* anchor;
  const T* noise;

  AIM_INLINE Tile advanced(int64_t by) const {
    return {theta_in + by,
            theta_out + by,
            grad + by,
            m ? m + by : m,
            v ? v + by : v,
            w ? w + by : w,
            live ? live + by : live,
            anchor ? anchor + by : anchor,
            noise ? noise + by : noise};
  }
};

template <class T>
struct alignas(64) Sums {
  T grad[kLanes], grad_sq[kLanes], update_sq[kLanes], param_sq[kLanes];
  typename CounterOf<T>::type under[kLanes];
};

// `count` must be a multiple of 16.
//
// Two short loops over a block instead of one long body: a square root followed by a division in
// one dependency chain would fill the processor's window with a single vector's work. The block's
// intermediate values stay in the first-level cache.
//
// With noise, whose drawing takes longer than all else, kLive only says that there may be a master.
template <RuleVariant kVariant, bool kPlain, bool kNoise, bool kLive, class T>
void run_variant(const Uniforms<T>& uniforms, const Tile<T>& tile, int64_t count, Sums<T>& sums) {
  using V = typename Lanes<T>::Vector;
  constexpr int kWidth = Lanes<T>::kCount, kParts = kLanes / kWidth, kSlots = kBlock / kWidth;
  constexpr bool kReloaded = is_adam(kVariant);  // whose numerator is m
  constexpr bool kEarly = kVariant == RuleVariant::kAmsgrad, kLate = has_extra(kVariant) && !kEarly;
  // Copies, which no store through a tile's pointers can change, as whole vectors.
  const Uniforms<V> u = mapped<V>(uniforms, [](T x) { return splat<V>(x); });
  const Tile<T> t = tile;
  // Known when this is compiled, but for the variants that may lack one.
  const bool keeps_m = has_first(kVariant) && (!may_lack(kVariant) || t.m),
             keeps_v = has_second(kVariant) && (!may_lack(kVariant) || t.v),
             keeps_w = kLate && (!may_lack(kVariant) || t.w), live = kLive && (!kNoise || t.live);
  V grad[kParts] = {}, grad_sq[kParts] = {}, update_sq[kParts] = {}, param_sq[kParts] = {};
  typename Lanes<T>::Count under[kParts] = {};
  V numerators[kReloaded ? 1 : kSlots], denominators[has_root(kVariant) ? kSlots : 1],
      steps[kSlots], lives[kLive ? kSlots : 1];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    for (int64_t i = 0; i < size; i += kLanes) {
      // For the second loop, which would find its lines still in memory.
      __builtin_prefetch(t.theta_in + begin + i, 1);
      if (live) __builtin_prefetch(t.live + begin + i, 1);
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = begin + i + part * kWidth, slot = i / kWidth + part;
        V g = load<V>(t.grad + at), m{}, v{}, w{}, theta{};
        if (!kPlain && u.coupled) theta = load<V>(t.theta_in + at);
        if (keeps_m) m = load<V>(t.m + at);
        if (keeps_v) v = load<V>(t.v + at);
        if constexpr (kEarly) w = load<V>(t.w + at);
        const V noise = kNoise ? load<V>(t.noise + at) : V{};
        StepTerms<V> out;
        accumulate<kVariant, kPlain, kNoise>(u, theta, g, m, v, w, noise, out);
        const auto mask = classify<kVariant, kLive>(u, m, v, out);
        if (keeps_m) store(t.m + at, m);
        if (keeps_v) store(t.v + at, v);
        if constexpr (kEarly) store(t.w + at, w);
        if constexpr (has_root(kVariant)) denominators[slot] = out.denominator;
        if constexpr (!kReloaded) numerators[slot] = out.numerator;
        if constexpr (kLive) lives[slot] = out.live;
        steps[slot] = out.step;
        grad[part] += g;
        grad_sq[part] += g * g;
        add_mask(under[part], mask);
      }
    }
    for (int64_t i = 0; i < size; i += kLanes) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = begin + i + part * kWidth, slot = i / kWidth + part;
        StepTerms<V> in;
        if constexpr (kReloaded) in.numerator = load<V>(t.m + at);
        if constexpr (!kReloaded) in.numerator = numerators[slot];
        if constexpr (has_root(kVariant)) in.denominator = denominators[slot];
        if constexpr (kLive) in.live = lives[slot];
        in.step = steps[slot];
        V theta = load<V>(t.theta_in + at), w{};
        if (keeps_w) w = load<V>(t.w + at);
        const V delta = apply<kVariant>(u, in, w, theta);
        if (keeps_w) store(t.w + at, w);
        store(t.theta_out + at, theta);
        if (live) {
          const V anchor = t.anchor ? load<V>(t.anchor + at) : V{};
          store(t.live + at, live_weight(theta, anchor, in.live));
        }
        update_sq[part] += delta * delta;
        param_sq[part] += theta * theta;
      }
    }
  }
  __builtin_memcpy(sums.grad, grad, sizeof grad);
  __builtin_memcpy(sums.grad_sq, grad_sq, sizeof grad_sq);
  __builtin_memcpy(sums.update_sq, update_sq, sizeof update_sq);
  __builtin_memcpy(sums.param_sq, param_sq, sizeof param_sq);
  __builtin_memcpy(sums.under, under, sizeof under);
}

// One of those loops.
template <class T>
using Loop = void (*)(const Uniforms<T>&, const Tile<T>&, int64_t, Sums<T>&);

// The common case has a loop of its own; the others do not repay the code.
template <RuleVariant kVariant, class T>
Loop<T> loop_of(bool plain, bool noise, bool live) {
  if (noise) return run_variant<kVariant, false, true, true, T>;
  if constexpr (kVariant == RuleVariant::kAdam) {
    if (plain) {
      return live ? run_variant<kVariant, true, false, true, T>
                  : run_variant<kVariant, true, false, false, T>;
    }
  }
  return live ? run_variant<kVariant, false, false, true, T>
              : run_variant<kVariant, false, false, false, T>;
}

template <class T>
Loop<T> loop_of(const Shared& shared, bool live) {
  const bool plain = shared.u.plain, noise = shared.has_noise;
  switch (shared.variant) {
    case RuleVariant::kAdam:
      return loop_of<RuleVariant::kAdam, T>(plain, noise, live);
    case RuleVariant::kAmsgrad:
      return loop_of<RuleVariant::kAmsgrad, T>(plain, noise, live);
    case RuleVariant::kSgd:
      return loop_of<RuleVariant::kSgd, T>(plain, noise, live);
    case RuleVariant::kSgdMomentum:
      return loop_of<RuleVariant::kSgdMomentum, T>(plain, noise, live);
    case RuleVariant::kSgdState:
      return loop_of<RuleVariant::kSgdState, T>(plain, noise, live);
    case RuleVariant::kSgdMomentumState:
      return loop_of<RuleVariant::kSgdMomentumState, T>(plain, noise, live);
    case RuleVariant::kRms:
      return loop_of<RuleVariant::kRms, T>(plain, noise, live);
    case RuleVariant::kLion:
      return loop_of<RuleVariant::kLion, T>(plain, noise, live);
  }
  return nullptr;
}

template <class T>
AIM_CALLED void add(const Sums<T>& sums, int lanes, Partial& into) {
  for (int lane = 0; lane < lanes; ++lane) {
    into.grad_sum += sums.grad[lane];
    into.grad_sq += sums.grad_sq[lane];
    into.update_sq += sums.update_sq[lane];
    into.param_sq += sums.param_sq[lane];
    into.under += sums.under[lane];
  }
}

AIM_INLINE void add(const Partial& more, Partial& into) {
  into.under += more.under;
  into.grad_sum += more.grad_sum;
  into.grad_sq += more.grad_sq;
  into.update_sq += more.update_sq;
  into.param_sq += more.param_sq;
  into.nonfinite += more.nonfinite;
}

// The last elements of a tensor, padded to 16 in buffers.
template <class T>
struct Padded {
  T theta[kLanes] = {}, grad[kLanes] = {}, m[kLanes] = {}, v[kLanes] = {}, w[kLanes] = {},
    live[kLanes] = {}, anchor[kLanes] = {}, noise[kLanes] = {};
};

template <class T>
Tile<T> pad(const Tile<T>& t, int rest, Padded<T>& to) {
  const unsigned long bytes = rest * sizeof(T);
  const auto take = [bytes](const T* from, T* into) {
    if (from) __builtin_memcpy(into, from, bytes);
    return from ? into : nullptr;
  };
  return {take(t.theta_in, to.theta),
          to.theta,
          take(t.grad, to.grad),
          take(t.m, to.m),
          take(t.v, to.v),
          take(t.w, to.w),
          t.live ? to.live : nullptr,
          take(t.anchor, to.anchor),
          take(t.noise, to.noise)};
}

template <class T>
void put_back(const Padded<T>& from, int rest, const Tile<T>& t) {
  const unsigned long bytes = rest * sizeof(T);
  __builtin_memcpy(t.theta_out, from.theta, bytes);
  if (t.m) __builtin_memcpy(t.m, from.m, bytes);
  if (t.v) __builtin_memcpy(t.v, from.v, bytes);
  if (t.w) __builtin_memcpy(t.w, from.w, bytes);
  if (t.live) __builtin_memcpy(t.live, from.live, bytes);
}

// They are run by the same code, the padding's lanes left out of the sums.
template <class T>
void run_tail(Loop<T> run, const Uniforms<T>& u, const Tile<T>& t, int rest, Sums<T>& sums) {
  Padded<T> padded;
  run(u, pad(t, rest, padded), kLanes, sums);
  put_back(padded, rest, t);
}

template <class S>
AIM_CALLED void widen_all(const S* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <class S>
AIM_CALLED void narrow_all(const float* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow(from[i], S{});
}

template <class T, class S>
AIM_INLINE const T* widened(const S* from, int64_t count, T* buffer) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return from;
  } else {
    widen_all(from, count, buffer);
    return buffer;
  }
}

template <class T>
AIM_CALLED void draw_noise(const Shared& shared, int64_t first, int64_t count, T* into) {
  float z[4];
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t index = static_cast<uint64_t>(first + i);
    if (i == 0 || index % 4 == 0) normal4(shared.seed, shared.counter, index / 4, z);
    into[i] = z[index % 4];
  }
}

// The sums that hold for gradients whose squares leave float32's range, and the count of what is
// not finite.
template <class T>
AIM_CALLED void rescan(const T* grad, T scale, int64_t count, Partial& into) {
  for (int64_t i = 0; i < count; ++i) {
    const T g = grad[i] * scale;
    into.nonfinite += g - g != T{0};
    into.grad_sq += static_cast<double>(g) * g;
  }
}

// Whether a tile needs rescan().
AIM_INLINE bool out_of_range(const Partial& tile) {
  return tile.grad_sq - tile.grad_sq != 0 || (tile.grad_sq == 0 && tile.grad_sum != 0);
}

// A moment from element `at` on; null where there is none, or the variant does not know it.
template <class T>
AIM_INLINE T* part(bool kept, void* moment, int64_t at) {
  return kept && moment ? static_cast<T*>(moment) + at : nullptr;
}

// Live weights of `count` elements, by the class that their stored moments have at that boundary;
// without both moments all are under-optimized.
template <class S, class T>
AIM_CALLED void write_live(const T* theta, const T* m, const T* v, const T* anchor,
                           const T (&coefficients)[2], T c_v, T c_0, int64_t count, S* live) {
  for (int64_t i = 0; i < count; ++i) {
    const bool under = !(m && v) || is_under(m[i], v[i], c_v, c_0);
    const T c = coefficients[under ? kUnder : kWell];
    live[i] = narrowed_to(live_weight(theta[i], anchor ? anchor[i] : T{0}, c), S{});
  }
}

// S: storage type of parameter, gradient and live weights. T: of everything else. What depends on
// the variant is the loop.
template <class S, class T>
void update_chunk(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                  Partial* partial) {
  constexpr bool kConvert = sizeof(S) != sizeof(T);
  const bool noisy = shared.has_noise;
  const int64_t stride = kConvert || noisy ? kConvertedTile : kTile;
  T theta_buffer[kConvert ? kConvertedTile : 1], grad_buffer[kConvert ? kConvertedTile : 1],
      noise_buffer[kConvertedTile];
  const Uniforms<T> u = rounded<T>(shared.u);
  S* const param = static_cast<S*>(tensor.param);
  T* const master = static_cast<T*>(tensor.master);
  const bool live = master != nullptr;
  const Loop<T> run = loop_of<T>(shared, live);
  RoundingBits random;
  Partial total{};
  for (int64_t at = begin; at < end; at += stride) {
    const int64_t count = end - at < stride ? end - at : stride;
    Tile<T> t;
    t.grad = widened(static_cast<const S*>(tensor.grad) + at, count, grad_buffer);
    t.m = part<T>(has_first(shared.variant), tensor.exp_avg, at);
    t.v = part<T>(has_second(shared.variant), tensor.exp_avg_sq, at);
    t.w = part<T>(has_extra(shared.variant), tensor.extra, at);
    t.anchor = live && tensor.anchor ? static_cast<const T*>(tensor.anchor) + at : nullptr;
    // What is written to storage: live weights where there is a master, the true weights elsewhere.
    T* stored = theta_buffer;
    if constexpr (!kConvert) stored = reinterpret_cast<T*>(param + at);
    if (live) {
      t.theta_in = t.theta_out = master + at;
      t.live = stored;
    } else {
      t.theta_in = t.theta_out = stored;
      if constexpr (kConvert) read_weights<S>(tensor, at, count, theta_buffer);
      t.live = nullptr;
    }
    t.noise = noisy ? noise_buffer : nullptr;
    if (noisy) draw_noise(shared, tensor.first + at, count, noise_buffer);

    const int64_t body = count / kLanes * kLanes;
    const int rest = static_cast<int>(count - body);
    Partial tile{};
    Sums<T> sums;
    if (body) {
      run(u, t, body, sums);
      add(sums, kLanes, tile);
    }
    if (rest) {
      run_tail(run, u, t.advanced(body), rest, sums);
      add(sums, rest, tile);
    }
    if constexpr (kConvert) {
      if (live) {
        narrow_all(stored, count, param + at);
      } else {
        keep_weights<S>(tensor, shared, random, stored, at, count);
      }
    }
    if (tensor.ema) {
      move_average(u, t.theta_out, count, static_cast<T*>(tensor.ema) + at);
      // The loop above knew the average of the step before.
      if (live && tensor.anchor == tensor.ema) {
        write_live(t.theta_out, t.m, t.v, static_cast<const T*>(tensor.ema) + at, u.live, u.new_c_v,
                   u.new_c_0, count, param + at);
      }
    }
    if (out_of_range(tile)) {
      tile.grad_sq = 0;
      rescan(t.grad, u.scale, count, tile);
    }
    if (tensor.zero_grad) {
      __builtin_memset(static_cast<S*>(tensor.grad) + at, 0,
                       static_cast<size_t>(count) * sizeof(S));
    }
    add(tile, total);
  }
  *partial = total;
}

template <class S, class T>
void emit_chunk(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end) {
  const Uniforms<T> u = rounded<T>(shared.u);
  const auto part = [begin](const void* values) {
    return values ? static_cast<const T*>(values) + begin : nullptr;
  };
  write_live(part(tensor.master), part(tensor.exp_avg), part(tensor.exp_avg_sq),
             part(tensor.anchor), u.live, u.old_c_v, u.old_c_0, end - begin,
             static_cast<S*>(tensor.param) + begin);
}

}  // namespace AIM_ISA
}  // namespace aim
