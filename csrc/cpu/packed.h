// One chunk of a tensor whose moments are stored in fewer bits, a block of 128 elements at a time;
// and of others whose weights or averages are better moved in registers (dispatch.h says which).
//
// The class of an element is that of its stored moments, which are known once the whole block is
// (8 bits share the exponent of the greatest). So one loop computes moments and direction, and a
// second stores the moments and takes the step; what is between stays in the first-level cache.
#pragma once

#include <type_traits>

#include "cpu/chunk.h"
#include "cpu/moments.h"

namespace aim {
namespace AIM_ISA {

// Gradients and weights of a block as they lie in memory, for types that one instruction converts.
template <class S>
struct DirectWeights {
  static constexpr bool kDirect = true;
  const S* grad;
  float* theta;  // where true weights are float32; null: they are in `param`
  S* param;

  DirectWeights(const Tensor& t, int64_t at)
      : grad(static_cast<const S*>(t.grad) + at),
        theta(t.master ? static_cast<float*>(t.master) + at : nullptr),
        param(static_cast<S*>(t.param) + at) {}
  AIM_INLINE FloatVector read_grad(int i) const { return read(grad + i); }
  template <bool kLive>
  AIM_INLINE FloatVector read_theta(int i) const {
    return kLive ? load<FloatVector>(theta + i) : read(param + i);
  }
  template <bool kLive>
  AIM_INLINE void keep_theta(int i, FloatVector x) const {
    kLive ? store(theta + i, x) : write(param + i, x);
  }
  AIM_INLINE void write_live(int i, FloatVector x) const { write(param + i, x); }

 private:
  static AIM_INLINE FloatVector read(const float* from) { return load<FloatVector>(from); }
  static AIM_INLINE FloatVector read(const BFloat16* from) {
    return as_float(from_small(&from->bits) << 16);
  }
  static AIM_INLINE void write(float* to, FloatVector x) { store(to, x); }
  static AIM_INLINE void write(BFloat16* to, FloatVector x) {
    to_small((bfloat16_bits<false>(x, IntVector{}) >> 16) & 0xFFFF, &to->bits);
  }
};

// The same of bfloat16 weights that are whole with their remainder.
struct SplitWeights {
  static constexpr bool kDirect = true;
  const uint16_t* grad;
  uint16_t *upper, *rest;

  SplitWeights(const Tensor& t, int64_t at)
      : grad(static_cast<const uint16_t*>(t.grad) + at),
        upper(static_cast<uint16_t*>(t.param) + at),
        rest(static_cast<uint16_t*>(t.rest) + at) {}
  AIM_INLINE FloatVector read_grad(int i) const { return as_float(from_small(grad + i) << 16); }
  template <bool kLive>
  AIM_INLINE FloatVector read_theta(int i) const {
    return as_float(joined_bits(from_small(upper + i), from_small(rest + i)));
  }
  template <bool kLive>
  AIM_INLINE void keep_theta(int i, FloatVector x) const {
    IntVector high, low;
    split_bits(as_int(x), &high, &low);
    to_small(high, upper + i);
    to_small(low, rest + i);
  }
  AIM_INLINE void write_live(int, FloatVector) const {}  // there is a master then
};

// Calls `run` with a null pointer to the storage type of a tensor.
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

AIM_CALLED void read_grads(const Tensor& tensor, int64_t at, int64_t count, float* to) {
  with_storage(tensor, [&](auto* like) {
    const auto* const from = static_cast<decltype(like)>(tensor.grad) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = widened_one(from[i]);
  });
}

// The same of any type and any way to keep true weights, through buffers.
struct BufferedWeights {
  static constexpr bool kDirect = false;
  const Tensor& tensor;
  int64_t at;
  float grad[kPackedBlock], theta[kPackedBlock], live[kPackedBlock];

  BufferedWeights(const Tensor& t, int64_t at) : tensor(t), at(at) {
    read_grads(t, at, kPackedBlock, grad);
    if (t.master) {
      __builtin_memcpy(theta, static_cast<const float*>(t.master) + at, sizeof theta);
      return;
    }
    with_storage(t, [&](auto* like) {
      read_weights<std::remove_pointer_t<decltype(like)>>(t, at, kPackedBlock, theta);
    });
  }
  AIM_INLINE FloatVector read_grad(int i) const { return load<FloatVector>(grad + i); }
  template <bool kLive>
  AIM_INLINE FloatVector read_theta(int i) const {
    return load<FloatVector>(theta + i);
  }
  template <bool kLive>
  AIM_INLINE void keep_theta(int i, FloatVector x) {
    store(theta + i, x);
  }
  AIM_INLINE void write_live(int i, FloatVector x) { store(live + i, x); }
  void finish(const Shared& shared, RoundingBits& random) const {
    with_storage(tensor, [&](auto* like) {
      using S = std::remove_pointer_t<decltype(like)>;
      if (!tensor.master) return keep_weights<S>(tensor, shared, random, theta, at, kPackedBlock);
      __builtin_memcpy(static_cast<float*>(tensor.master) + at, theta, sizeof theta);
      S* const to = static_cast<S*>(tensor.param) + at;
      for (int64_t i = 0; i < kPackedBlock; ++i) to[i] = narrowed_to(live[i], S{});
    });
  }
};

// What the first loop leaves for the second.
struct PackedBlock {
  float m[kPackedBlock], v[kPackedBlock], w[kPackedBlock], noise[kPackedBlock],
      numerator[kPackedBlock], denominator[kPackedBlock];
};

// What was drawn for a tensor, which serves more than one block.
struct PackedBits {
  RoundingBits moments, weights;
};

// What all blocks of a tensor have in common.
template <Kind kKind>
struct PackedStep {
  const Tensor& tensor;
  const Shared& shared;
  Uniforms<FloatVector> u;
  PackedStep(const Tensor& t, const Shared& s)
      : tensor(t),
        shared(s),
        u(mapped<FloatVector>(rounded<float>(s.u), [](float x) { return splat<FloatVector>(x); })) {
  }

  // Known when this is compiled, but for the kinds that may lack one.
  AIM_INLINE bool keeps_m() const {
    return has_first(kKind) && (!may_lack(kKind) || tensor.exp_avg);
  }
  AIM_INLINE bool keeps_v() const {
    return has_second(kKind) && (!may_lack(kKind) || tensor.exp_avg_sq);
  }
  AIM_INLINE bool keeps_w() const { return has_extra(kKind) && (!may_lack(kKind) || tensor.extra); }
};

// Steps 1 to 3 for elements [from, to) of a block, a multiple of 16.
template <Kind kKind, bool kNoise, bool kLive, class W, class M>
AIM_INLINE void accumulate_block(const PackedStep<kKind>& s, int from, int to, W& weights,
                                 M& moments, PackedBlock& b, Sums<float>& sums) {
  using V = FloatVector;
  constexpr int kParts = kLanes / kStep;
  const Uniforms<V>& u = s.u;
  V grad[kParts], grad_sq[kParts];
  __builtin_memcpy(grad, sums.grad, sizeof grad);
  __builtin_memcpy(grad_sq, sums.grad_sq, sizeof grad_sq);
  for (int i = from; i < to; i += kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int lane = i + part * kStep;
      V g = weights.read_grad(lane), m{}, v{}, w{}, theta{};
      if (u.coupled) theta = weights.template read_theta<kLive>(lane);
      if (s.keeps_m()) m = moments.read(kFirstMoment, lane);
      if (s.keeps_v()) v = moments.read(kSecondMoment, lane);
      if (s.keeps_w()) w = moments.read(kExtraMoment, lane);
      const V noise = kNoise ? load<V>(b.noise + lane) : V{};
      Between<V> out;
      accumulate<kKind, false, kNoise>(u, theta, g, m, v, w, noise, out);
      if (s.keeps_m()) moments.gather(kFirstMoment, m);
      if (s.keeps_v()) moments.gather(kSecondMoment, v);
      if constexpr (kKind == Kind::kAmsgrad) moments.gather(kExtraMoment, w);
      if constexpr (has_first(kKind)) store(b.m + lane, m);
      if constexpr (has_second(kKind)) store(b.v + lane, v);
      if constexpr (has_extra(kKind)) store(b.w + lane, w);
      if constexpr (!is_adam(kKind)) store(b.numerator + lane, out.numerator);
      if constexpr (has_root(kKind)) store(b.denominator + lane, out.denominator);
      grad[part] += g;
      grad_sq[part] += g * g;
    }
  }
  __builtin_memcpy(sums.grad, grad, sizeof grad);
  __builtin_memcpy(sums.grad_sq, grad_sq, sizeof grad_sq);
}

// Stores the moments; steps 4 to 6 by the class of what was stored.
template <Kind kKind, bool kLive, class W, class M>
AIM_INLINE void apply_block(const PackedStep<kKind>& s, int from, int to, W& weights, M& moments,
                            PackedBlock& b, const uint32_t* bits, const float* anchor, float* ema,
                            Sums<float>& sums) {
  using V = FloatVector;
  constexpr int kParts = kLanes / kStep;
  const Uniforms<V>& u = s.u;
  V update_sq[kParts], param_sq[kParts];
  typename Lanes<float>::Count under[kParts];
  __builtin_memcpy(update_sq, sums.update_sq, sizeof update_sq);
  __builtin_memcpy(param_sq, sums.param_sq, sizeof param_sq);
  __builtin_memcpy(under, sums.under, sizeof under);
  for (int i = from; i < to; i += kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int lane = i + part * kStep;
      Between<V> in;
      V m{}, v{}, w{};
      if constexpr (has_first(kKind)) m = load<V>(b.m + lane);
      if constexpr (has_second(kKind)) v = load<V>(b.v + lane);
      if constexpr (has_extra(kKind)) w = load<V>(b.w + lane);
      if constexpr (is_adam(kKind)) in.numerator = m;
      if constexpr (!is_adam(kKind)) in.numerator = load<V>(b.numerator + lane);
      if constexpr (has_root(kKind)) in.denominator = load<V>(b.denominator + lane);
      const IntVector drawn = moments.random() ? load<IntVector>(bits + lane) : IntVector{};
      if (s.keeps_m()) m = moments.keep(kFirstMoment, lane, m, drawn);
      if (s.keeps_v()) v = moments.keep(kSecondMoment, lane, v, drawn);
      if constexpr (kKind == Kind::kAmsgrad) moments.keep(kExtraMoment, lane, w, drawn);
      add_mask(under[part], classify<kKind, kLive>(u, m, v, in));
      V theta = weights.template read_theta<kLive>(lane);
      const V delta = apply<kKind>(u, in, w, theta);
      if constexpr (kKind == Kind::kRms) store(b.w + lane, w);
      weights.template keep_theta<kLive>(lane, theta);
      if (ema) store(ema + lane, load<V>(ema + lane) * u.ema_keep + theta * u.ema_add);
      if constexpr (kLive) {
        // Which may be the average just stored.
        const V to = anchor ? load<V>(anchor + lane) : V{};
        weights.write_live(lane, live_weight(theta, to, in.live));
      }
      update_sq[part] += delta * delta;
      param_sq[part] += theta * theta;
    }
  }
  __builtin_memcpy(sums.update_sq, update_sq, sizeof update_sq);
  __builtin_memcpy(sums.param_sq, param_sq, sizeof param_sq);
  __builtin_memcpy(sums.under, under, sizeof under);
}

// The block of 128 elements from `at` on, of which `filled` are there: sums go to `sums`, of the
// last 16, if some of them are not there, to `ends`. The others are computed and stored.
template <Kind kKind, bool kNoise, bool kLive, class W, class M>
AIM_INLINE void step_block(const PackedStep<kKind>& s, M moments, int64_t at, int filled,
                           PackedBlock& b, PackedBits& bits, Sums<float>& sums, Sums<float>& ends) {
  const Tensor& tensor = s.tensor;
  W weights(tensor, at);
  if (s.keeps_m()) moments.enter(kFirstMoment, at);
  if (s.keeps_v()) moments.enter(kSecondMoment, at);
  if (s.keeps_w()) moments.enter(kExtraMoment, at);
  if (kNoise) {
    draw_noise(s.shared, tensor.first + at, filled, b.noise);
    // What is behind the last element stays zero, or it might be the greatest.
    for (int i = filled; i < kPackedBlock; ++i) b.noise[i] = 0;
  }
  const uint32_t* drawn = nullptr;
  if (moments.random()) {
    drawn = bits.moments.of_block(s.shared, kMomentStream, tensor.first - tensor.offset,
                                  tensor.offset + at);
  }
  const int body = filled / kLanes * kLanes, end = body < filled ? body + kLanes : body;
  // Twice around rather than written twice: the code would be as much larger.
  for (int part = body ? 0 : 1; part < (end > body ? 2 : 1); ++part) {
    accumulate_block<kKind, kNoise, kLive>(s, part ? body : 0, part ? end : body, weights, moments,
                                           b, part ? ends : sums);
  }
  if (s.keeps_m()) moments.close(kFirstMoment, at);
  if (s.keeps_v()) moments.close(kSecondMoment, at);
  if (kKind == Kind::kAmsgrad) moments.close(kExtraMoment, at);
  const float* const anchor =
      kLive && tensor.anchor ? static_cast<const float*>(tensor.anchor) + at : nullptr;
  float* const ema = tensor.ema ? static_cast<float*>(tensor.ema) + at : nullptr;
  for (int part = body ? 0 : 1; part < (end > body ? 2 : 1); ++part) {
    apply_block<kKind, kLive>(s, part ? body : 0, part ? end : body, weights, moments, b, drawn,
                              anchor, ema, part ? ends : sums);
  }
  if (s.keeps_m()) moments.leave(kFirstMoment);
  if (s.keeps_v()) moments.leave(kSecondMoment);
  if (kKind == Kind::kAmsgrad) moments.leave(kExtraMoment);
  if (kKind == Kind::kRms && s.keeps_w()) {
    for (int i = filled; i < end; ++i) b.w[i] = 0;  // 0 / 0, where eps is
    for (int i = 0; i < end; i += kStep) moments.gather(kExtraMoment, load<FloatVector>(b.w + i));
    moments.close(kExtraMoment, at);
    for (int i = 0; i < end; i += kStep) {
      const IntVector random = moments.random() ? load<IntVector>(drawn + i) : IntVector{};
      moments.keep(kExtraMoment, i, load<FloatVector>(b.w + i), random);
    }
    moments.leave(kExtraMoment);
  }
  if constexpr (!W::kDirect) weights.finish(s.shared, bits.weights);
}

// A copy of the last elements of a tensor, padded with zeros to a block.
class PaddedBlock {
 public:
  PaddedBlock(const Tensor& tensor, int64_t at, int64_t count) : whole_(tensor), at_(at) {
    padded = tensor;
    padded.first += at;
    padded.offset += at;
    const size_t moment = sizes_[tensor.moments];
    const size_t stored = static_cast<DType>(tensor.dtype) == DType::kFloat32 ? 4 : 2;
    take(&Tensor::param, stored, count);
    take(&Tensor::grad, stored, count);
    take(&Tensor::exp_avg, moment, count);
    take(&Tensor::exp_avg_sq, moment, count);
    take(&Tensor::extra, moment, count);
    take(&Tensor::master, 4, count);
    take(&Tensor::rest, 2, count);
    take(&Tensor::ema, 4, count);
    if (tensor.anchor && tensor.anchor == tensor.ema) {
      padded.anchor = padded.ema;
    } else if (tensor.anchor) {
      __builtin_memcpy(anchor_, static_cast<const float*>(tensor.anchor) + at, count * 4);
      padded.anchor = anchor_;
    }
    const int64_t blocks = at / kPackedBlock;
    if (padded.exp_avg_scale) padded.exp_avg_scale += blocks;
    if (padded.exp_avg_sq_scale) padded.exp_avg_sq_scale += blocks;
    if (padded.extra_scale) padded.extra_scale += blocks;
  }
  // Brings back what was written.
  void put_back() const {
    for (int i = 0; i < taken_; ++i) {
      const Taken& t = which_[i];
      if (t.field == &Tensor::grad) continue;
      __builtin_memcpy(static_cast<char*>(whole_.*t.field) + at_ * static_cast<int64_t>(t.size),
                       padded.*t.field, t.bytes);
    }
  }
  Tensor padded;

 private:
  struct Taken {
    void* Tensor::* field;
    size_t size, bytes;
  };
  void take(void* Tensor::* field, size_t size, int64_t count) {
    if (!(whole_.*field)) return;
    const size_t bytes = size * static_cast<size_t>(count);
    __builtin_memcpy(memory_[taken_],
                     static_cast<char*>(whole_.*field) + at_ * static_cast<int64_t>(size), bytes);
    padded.*field = memory_[taken_];
    which_[taken_++] = {field, size, bytes};
  }
  static constexpr size_t sizes_[] = {4, 2, 1};
  const Tensor& whole_;
  int64_t at_;
  int taken_ = 0;
  Taken which_[8];
  alignas(64) char memory_[8][kPackedBlock * 4] = {};
  float anchor_[kPackedBlock] = {};
};

// The last block of a tensor, which is not whole.
template <Kind kKind, bool kNoise, bool kLive, class W, class M>
__attribute__((noinline)) void step_last_block(const Tensor& tensor, const Shared& shared,
                                               int64_t at, int filled, PackedBlock& b,
                                               PackedBits& bits, Sums<float>& sums,
                                               Sums<float>& ends) {
  PaddedBlock last(tensor, at, filled);
  const PackedStep<kKind> rest(last.padded, shared);
  step_block<kKind, kNoise, kLive, W>(rest, M(last.padded), 0, filled, b, bits, sums, ends);
  last.put_back();
}

template <Kind kKind, bool kNoise, bool kLive, class W, class M>
void update_packed(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                   Partial* partial) {
  const PackedStep<kKind> whole(tensor, shared);
  const M moments(tensor);
  PackedBlock b{};
  PackedBits bits;
  Partial total{};
  for (int64_t tile = begin; tile < end; tile += kConvertedTile) {
    const int64_t tile_end = end - tile < kConvertedTile ? end : tile + kConvertedTile;
    Sums<float> sums{}, ends{};
    int64_t at = tile;
    for (; at + kPackedBlock <= tile_end; at += kPackedBlock) {
      step_block<kKind, kNoise, kLive, W>(whole, moments, at, kPackedBlock, b, bits, sums, ends);
    }
    const int filled = static_cast<int>(tile_end - at);
    if (filled) {
      step_last_block<kKind, kNoise, kLive, W, M>(tensor, shared, at, filled, b, bits, sums, ends);
    }
    Partial measured{};
    add(sums, kLanes, measured);
    add(ends, filled % kLanes, measured);
    if (out_of_range(measured)) {
      measured.grad_sq = 0;
      float grads[kConvertedTile];
      read_grads(tensor, tile, tile_end - tile, grads);
      rescan(grads, static_cast<float>(shared.u.scale), tile_end - tile, measured);
    }
    if (tensor.zero_grad) {
      with_storage(tensor, [&](auto* like) {
        auto* const grad = static_cast<decltype(like)>(tensor.grad);
        __builtin_memset(grad + tile, 0, static_cast<size_t>(tile_end - tile) * sizeof *grad);
      });
    }
    add(measured, total);
  }
  *partial = total;
}

// Live weights of stored moments and masters.
template <class M>
void emit_packed(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end) {
  const Uniforms<float> u = rounded<float>(shared.u);
  const bool classed = tensor.exp_avg && tensor.exp_avg_sq;
  for (int64_t at = begin; at < end; at += kPackedBlock) {
    const int64_t count = end - at < kPackedBlock ? end - at : kPackedBlock;
    PaddedBlock block(tensor, at, count);
    const Tensor& t = block.padded;
    M moments(t);
    float m[kPackedBlock] = {}, v[kPackedBlock] = {};
    if (classed) {
      moments.enter(kFirstMoment, 0);
      moments.enter(kSecondMoment, 0);
      for (int i = 0; i < kPackedBlock; i += kStep) {
        store(m + i, moments.read(kFirstMoment, i));
        store(v + i, moments.read(kSecondMoment, i));
      }
    }
    const float* const theta = static_cast<const float*>(t.master);
    const float* const anchor = static_cast<const float*>(t.anchor);
    with_storage(t, [&](auto* like) {
      using S = std::remove_pointer_t<decltype(like)>;
      for (int64_t i = 0; i < count; ++i) {
        const bool under = !classed || is_under(m[i], v[i], u.old_v, u.old_0);
        const float live =
            live_weight(theta[i], anchor ? anchor[i] : 0.0f, u.live[under ? kUnder : kWell]);
        static_cast<S*>(tensor.param)[at + i] = narrowed_to(live, S{});
      }
    });
  }
}

}  // namespace AIM_ISA
}  // namespace aim
