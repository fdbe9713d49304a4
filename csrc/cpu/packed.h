// One chunk of a tensor whose moments are stored in fewer bits: a block of 128 elements at a time,
// in buffers that stay in the first-level cache.
//
// The class of an element is that of its stored moments, which are known once the whole block is
// (8 bits share the exponent of the greatest): moments and direction, then storing, then the step.
#pragma once

#include <type_traits>

#include "cpu/chunk.h"

namespace aim {
namespace AIM_ISA {

struct PackedBlock {
  float theta[kPackedBlock], grad[kPackedBlock], m[kPackedBlock], v[kPackedBlock], w[kPackedBlock],
      noise[kPackedBlock], live[kPackedBlock], anchor[kPackedBlock], numerator[kPackedBlock],
      denominator[kPackedBlock];
};

// Steps 1 to 3, for elements [first, last) of a block, a multiple of 16.
template <Kind kKind, bool kNoise>
AIM_INLINE void accumulate_block(const Uniforms<FloatVector>& u, int64_t first, int64_t last,
                                 PackedBlock& b, Sums<float>& sums) {
  using V = FloatVector;
  constexpr int kParts = kLanes / kStep;
  V grad[kParts], grad_sq[kParts];
  __builtin_memcpy(grad, sums.grad, sizeof grad);
  __builtin_memcpy(grad_sq, sums.grad_sq, sizeof grad_sq);
  for (int64_t i = first; i < last; i += kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = i + part * kStep;
      V g = load<V>(b.grad + at), m{}, v{}, w{}, theta{};
      if (u.coupled) theta = load<V>(b.theta + at);
      if constexpr (has_first(kKind)) m = load<V>(b.m + at);
      if constexpr (has_second(kKind)) v = load<V>(b.v + at);
      if constexpr (kKind == Kind::kAmsgrad) w = load<V>(b.w + at);
      const V noise = kNoise ? load<V>(b.noise + at) : V{};
      Between<V> out;
      accumulate<kKind, false, kNoise>(u, theta, g, m, v, w, noise, out);
      if constexpr (has_first(kKind)) store(b.m + at, m);
      if constexpr (has_second(kKind)) store(b.v + at, v);
      if constexpr (kKind == Kind::kAmsgrad) store(b.w + at, w);
      if constexpr (is_adam(kKind)) out.numerator = m;
      store(b.numerator + at, out.numerator);
      if constexpr (has_root(kKind)) store(b.denominator + at, out.denominator);
      grad[part] += g;
      grad_sq[part] += g * g;
    }
  }
  __builtin_memcpy(sums.grad, grad, sizeof grad);
  __builtin_memcpy(sums.grad_sq, grad_sq, sizeof grad_sq);
}

// The class of the stored moments, steps 4 to 6.
template <Kind kKind, bool kLive>
AIM_INLINE void apply_block(const Uniforms<FloatVector>& u, int64_t first, int64_t last,
                            PackedBlock& b, Sums<float>& sums) {
  using V = FloatVector;
  constexpr int kParts = kLanes / kStep;
  V update_sq[kParts], param_sq[kParts];
  typename Lanes<float>::Count under[kParts];
  __builtin_memcpy(update_sq, sums.update_sq, sizeof update_sq);
  __builtin_memcpy(param_sq, sums.param_sq, sizeof param_sq);
  __builtin_memcpy(under, sums.under, sizeof under);
  for (int64_t i = first; i < last; i += kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = i + part * kStep;
      Between<V> in;
      in.numerator = load<V>(b.numerator + at);
      if constexpr (has_root(kKind)) in.denominator = load<V>(b.denominator + at);
      V m{}, v{}, w{}, theta = load<V>(b.theta + at);
      if constexpr (has_first(kKind)) m = load<V>(b.m + at);
      if constexpr (has_second(kKind)) v = load<V>(b.v + at);
      add_mask(under[part], classify<kKind, kLive>(u, m, v, in));
      if constexpr (kKind == Kind::kRms) w = load<V>(b.w + at);
      const V delta = apply<kKind>(u, in, w, theta);
      if constexpr (kKind == Kind::kRms) store(b.w + at, w);
      store(b.theta + at, theta);
      if constexpr (kLive) store(b.live + at, live_weight(theta, load<V>(b.anchor + at), in.live));
      update_sq[part] += delta * delta;
      param_sq[part] += theta * theta;
    }
  }
  __builtin_memcpy(sums.update_sq, update_sq, sizeof update_sq);
  __builtin_memcpy(sums.param_sq, param_sq, sizeof param_sq);
  __builtin_memcpy(sums.under, under, sizeof under);
}

// Calls `run` with a null pointer to the storage type of a tensor: known once a block, since the
// kernels know it no better.
template <class Run>
AIM_INLINE void with_storage(const Tensor& tensor, const Run& run) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kBFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return run(static_cast<Float16*>(nullptr));
    default:
      return run(static_cast<float*>(nullptr));
  }
}

AIM_INLINE void read_grad(const Tensor& tensor, int64_t at, int64_t count, float* to) {
  with_storage(tensor, [&](auto* like) {
    const auto* const from = static_cast<decltype(like)>(tensor.grad) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = widened_one(from[i]);
  });
}

AIM_INLINE void read_theta(const Tensor& tensor, int64_t at, int64_t count, float* to) {
  if (tensor.master) {
    __builtin_memcpy(to, static_cast<const float*>(tensor.master) + at, count * sizeof(float));
    return;
  }
  with_storage(tensor, [&](auto* like) {
    read_weights<std::remove_pointer_t<decltype(like)>>(tensor, at, count, to);
  });
}

AIM_INLINE void keep_theta(const Tensor& tensor, const Shared& shared, const float* from,
                           int64_t at, int64_t count) {
  if (tensor.master) {
    __builtin_memcpy(static_cast<float*>(tensor.master) + at, from, count * sizeof(float));
    return;
  }
  with_storage(tensor, [&](auto* like) {
    keep_weights<std::remove_pointer_t<decltype(like)>>(tensor, shared, from, at, count);
  });
}

AIM_INLINE void write_live(const Tensor& tensor, const float* from, int64_t at, int64_t count) {
  with_storage(tensor, [&](auto* like) {
    auto* const to = static_cast<decltype(like)>(tensor.param) + at;
    for (int64_t i = 0; i < count; ++i)
      to[i] = narrowed_to(from[i], std::remove_pointer_t<decltype(like)>{});
  });
}

AIM_INLINE void clear_grad(const Tensor& tensor, int64_t begin, int64_t end) {
  with_storage(tensor, [&](auto* like) {
    auto* const grad = static_cast<decltype(like)>(tensor.grad);
    __builtin_memset(grad + begin, 0, static_cast<size_t>(end - begin) * sizeof *grad);
  });
}

// A tensor's moments as they are stored: first, second, third.
struct StoredMoments {
  StoredMoment m, v, w;
};

AIM_INLINE StoredMoments stored_moments(const Tensor& t, Kind kind) {
  const Moments how = static_cast<Moments>(t.moments);
  const bool stochastic = t.stochastic != 0;
  return {{t.exp_avg, t.exp_avg_scale, how, true, stochastic},
          {t.exp_avg_sq, t.exp_avg_sq_scale, how, false, stochastic},
          {t.extra, t.extra_scale, how, kind == Kind::kRms, stochastic}};
}

template <Kind kKind, bool kNoise, bool kLive>
void update_packed(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                   Partial* partial) {
  const Uniforms<float> scalars = rounded<float>(shared.u);
  const Uniforms<FloatVector> u =
      mapped<FloatVector>(scalars, [](float x) { return splat<FloatVector>(x); });
  const StoredMoments moments = stored_moments(tensor, kKind);
  // Known when this is compiled, but for the kinds that may lack one.
  const bool keeps_m = has_first(kKind) && (!may_lack(kKind) || tensor.exp_avg),
             keeps_v = has_second(kKind) && (!may_lack(kKind) || tensor.exp_avg_sq),
             keeps_w = has_extra(kKind) && (!may_lack(kKind) || tensor.extra);
  const bool random = tensor.stochastic != 0;
  const float* const anchor = static_cast<const float*>(tensor.anchor);
  PackedBlock b{};
  RoundingBits bits;
  Partial total{};
  for (int64_t tile = begin; tile < end; tile += kConvertedTile) {
    const int64_t tile_end = end - tile < kConvertedTile ? end : tile + kConvertedTile;
    Sums<float> sums{}, ends{};
    int rest = 0;
    for (int64_t at = tile; at < tile_end; at += kPackedBlock) {
      const int64_t count = tile_end - at < kPackedBlock ? tile_end - at : kPackedBlock;
      const int64_t body = count / kLanes * kLanes;
      if (count < kPackedBlock) b = PackedBlock{};  // zeros behind the last element
      read_grad(tensor, at, count, b.grad);
      read_theta(tensor, at, count, b.theta);
      if (kLive && anchor) __builtin_memcpy(b.anchor, anchor + at, count * sizeof(float));
      if (keeps_m) moments.m.read(at, count, b.m);
      if (keeps_v) moments.v.read(at, count, b.v);
      if (keeps_w) moments.w.read(at, count, b.w);
      if (kNoise) draw_noise(shared, tensor.first + at, count, b.noise);
      if (random) {
        bits.draw(shared, kMomentStream, tensor.first - tensor.offset, tensor.offset + at);
      }

      accumulate_block<kKind, kNoise>(u, 0, body, b, sums);
      // Of the last 16 only `rest` are there; the others are computed, and left out of the sums.
      rest = static_cast<int>(count - body);
      if (rest) accumulate_block<kKind, kNoise>(u, body, body + kLanes, b, ends);
      if (keeps_m) moments.m.keep(b.m, at, count, bits.of);
      if (keeps_v) moments.v.keep(b.v, at, count, bits.of);
      if (kKind == Kind::kAmsgrad) moments.w.keep(b.w, at, count, bits.of);
      apply_block<kKind, kLive>(u, 0, body, b, sums);
      if (rest) apply_block<kKind, kLive>(u, body, body + kLanes, b, ends);
      if (kKind != Kind::kAmsgrad && keeps_w) moments.w.keep(b.w, at, count, bits.of);

      keep_theta(tensor, shared, b.theta, at, count);
      if (kLive) write_live(tensor, b.live, at, count);
      if (tensor.ema) move_average(scalars, b.theta, count, static_cast<float*>(tensor.ema) + at);
    }
    Partial measured{};
    add(sums, kLanes, measured);
    add(ends, rest, measured);
    if (out_of_range(measured)) {
      measured.grad_sq = 0;
      for (int64_t at = tile; at < tile_end; at += kPackedBlock) {
        const int64_t count = tile_end - at < kPackedBlock ? tile_end - at : kPackedBlock;
        read_grad(tensor, at, count, b.grad);
        rescan(b.grad, scalars.scale, count, measured);
      }
    }
    if (tensor.zero_grad) clear_grad(tensor, tile, tile_end);
    add(measured, total);
  }
  *partial = total;
}

inline void emit_packed(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end) {
  const Uniforms<float> u = rounded<float>(shared.u);
  const StoredMoments moments = stored_moments(tensor, shared.kind);
  const float* const theta = static_cast<const float*>(tensor.master);
  const float* const anchor = static_cast<const float*>(tensor.anchor);
  const bool classed = tensor.exp_avg && tensor.exp_avg_sq;
  float m[kPackedBlock], v[kPackedBlock], live[kPackedBlock];
  for (int64_t at = begin; at < end; at += kPackedBlock) {
    const int64_t count = end - at < kPackedBlock ? end - at : kPackedBlock;
    if (classed) {
      moments.m.read(at, count, m);
      moments.v.read(at, count, v);
    }
    for (int64_t i = 0; i < count; ++i) {
      const bool under = !classed || is_under(m[i], v[i], u.old_v, u.old_0);
      live[i] = live_weight(theta[at + i], anchor ? anchor[at + i] : 0.0f,
                            u.live[under ? kUnder : kWell]);
    }
    write_live(tensor, live, at, count);
  }
}

}  // namespace AIM_ISA
}  // namespace aim
