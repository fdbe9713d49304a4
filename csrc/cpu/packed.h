// One chunk of a tensor whose moments are stored in fewer bits, a block of 128 elements at a time;
// and of others whose weights or averages are better moved in registers (dispatch.h says which).
//
// The class of an element is that of its stored moments, which are known once the whole block is
// (8 bits share the exponent of the greatest). So one loop computes moments and direction, and a
// second stores the moments and takes the step; what is between stays in the first-level cache.
#pragma once

#include "cpu/moments.h"
#include "cpu/update.h"
#include "cpu/weights.h"

namespace aim {
namespace AIM_ISA {

// What the first loop leaves for the second. Aligned, since vectors that lie across two cache lines
// are slow to store and to read.
struct alignas(64) PackedBlock {
  float m[kPackedBlock], v[kPackedBlock], w[kPackedBlock], noise[kPackedBlock],
      numerator[kPackedBlock], denominator[kPackedBlock];
};

// What was drawn for a tensor, which serves more than one block.
struct PackedBits {
  RoundingBits moments, weights;
};

// What all blocks of a tensor have in common.
template <RuleVariant kVariant>
struct PackedStep {
  const Tensor& tensor;
  const Shared& shared;
  Uniforms<FloatVector> u;
  PackedStep(const Tensor& t, const Shared& s)
      : tensor(t),
        shared(s),
        u(mapped<FloatVector>(rounded<float>(s.u), [](float x) { return splat<FloatVector>(x); })) {
  }

  // Known when this is compiled, but for the variants that may lack one.
  AIM_INLINE bool keeps_m() const {
    return has_first(kVariant) && (!may_lack(kVariant) || tensor.exp_avg);
  }
  AIM_INLINE bool keeps_v() const {
    return has_second(kVariant) && (!may_lack(kVariant) || tensor.exp_avg_sq);
  }
  AIM_INLINE bool keeps_w() const {
    return has_extra(kVariant) && (!may_lack(kVariant) || tensor.extra);
  }
};

// Steps 1 to 3 for elements [from, to) of a block, a multiple of 16. kSimple promises that
// gradients are neither decayed nor routed. Weights that lie in memory never have noise.
template <RuleVariant kVariant, bool kSimple = false, class W, class M>
AIM_INLINE void accumulate_block(const PackedStep<kVariant>& s, int from, int to, W& weights,
                                 M& moments, PackedBlock& b, Sums<float>& sums) {
  using V = FloatVector;
  constexpr int kParts = kLanes / kStep;
  Uniforms<V> u = s.u;
  if (kSimple) u.coupled = u.routed = false;
  const bool noisy = !W::kDirect && s.shared.has_noise;
  V grad[kParts], grad_sq[kParts];
  __builtin_memcpy(grad, sums.grad, sizeof grad);
  __builtin_memcpy(grad_sq, sums.grad_sq, sizeof grad_sq);
  for (int i = from; i < to; i += kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int lane = i + part * kStep;
      V g = weights.read_grad(lane), m{}, v{}, w{}, theta{};
      if (u.coupled) theta = weights.read_theta(lane);
      if (s.keeps_m()) m = moments.read(kFirstMoment, lane);
      if (s.keeps_v()) v = moments.read(kSecondMoment, lane);
      if (s.keeps_w()) w = moments.read(kExtraMoment, lane);
      StepTerms<V> out;
      if (noisy) {
        accumulate<kVariant, false, true>(u, theta, g, m, v, w, load<V>(b.noise + lane), out);
      } else {
        accumulate<kVariant, false, false>(u, theta, g, m, v, w, V{}, out);
      }
      if (s.keeps_m()) moments.gather(kFirstMoment, m);
      if (s.keeps_v()) moments.gather(kSecondMoment, v);
      if constexpr (kVariant == RuleVariant::kAmsgrad) moments.gather(kExtraMoment, w);
      if constexpr (has_first(kVariant)) store(b.m + lane, m);
      if constexpr (has_second(kVariant)) store(b.v + lane, v);
      if constexpr (has_extra(kVariant)) store(b.w + lane, w);
      if constexpr (!is_adam(kVariant)) store(b.numerator + lane, out.numerator);
      if constexpr (has_root(kVariant)) store(b.denominator + lane, out.denominator);
      grad[part] += g;
      grad_sq[part] += g * g;
    }
  }
  __builtin_memcpy(sums.grad, grad, sizeof grad);
  __builtin_memcpy(sums.grad_sq, grad_sq, sizeof grad_sq);
}

// What a block's elements have beside their moments: random bits, anchor, average.
struct BlockExtras {
  const uint32_t* drawn = nullptr;
  const float* anchor = nullptr;
  float* ema = nullptr;

  BlockExtras() = default;
  template <RuleVariant kVariant, class M>
  BlockExtras(const PackedStep<kVariant>& s, const M& moments, int64_t at, PackedBits& bits)
      : anchor(s.tensor.anchor ? static_cast<const float*>(s.tensor.anchor) + at : nullptr),
        ema(s.tensor.ema ? static_cast<float*>(s.tensor.ema) + at : nullptr) {
    if (!moments.random()) return;
    drawn = bits.moments.of_block(s.shared, kMomentStream, s.tensor.first - s.tensor.offset,
                                  s.tensor.offset + at);
  }
  template <class M>
  AIM_INLINE IntVector bits(const M& moments, int lane) const {
    return moments.random() ? load<IntVector>(drawn + lane) : IntVector{};
  }
};

// Stores the moments; steps 4 to 6 by the class of what was stored. kSimple promises
// that no average is kept.
template <RuleVariant kVariant, bool kSimple = false, class W, class M>
AIM_INLINE void apply_block(const PackedStep<kVariant>& s, int from, int to, W& weights, M& moments,
                            PackedBlock& b, const BlockExtras& extras, Sums<float>& sums) {
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
      StepTerms<V> in;
      V m{}, v{}, w{};
      if constexpr (has_first(kVariant)) m = load<V>(b.m + lane);
      if constexpr (has_second(kVariant)) v = load<V>(b.v + lane);
      if constexpr (has_extra(kVariant)) w = load<V>(b.w + lane);
      if constexpr (is_adam(kVariant)) in.numerator = m;
      if constexpr (!is_adam(kVariant)) in.numerator = load<V>(b.numerator + lane);
      if constexpr (has_root(kVariant)) in.denominator = load<V>(b.denominator + lane);
      const IntVector drawn = extras.bits(moments, lane);
      if (s.keeps_m()) m = moments.keep(kFirstMoment, lane, m, drawn);
      if (s.keeps_v()) v = moments.keep(kSecondMoment, lane, v, drawn);
      if constexpr (kVariant == RuleVariant::kAmsgrad) moments.keep(kExtraMoment, lane, w, drawn);
      add_mask(under[part], classify<kVariant, true>(u, m, v, in));
      V theta = weights.read_theta(lane);
      const V delta = apply<kVariant>(u, in, w, theta);
      if constexpr (kVariant == RuleVariant::kRms) store(b.w + lane, w);
      weights.keep_theta(lane, theta);
      if (!kSimple && extras.ema) {
        float* const ema = extras.ema + lane;
        store(ema, load<V>(ema) * u.ema_keep + theta * u.ema_add);
      }
      if (weights.has_live()) {
        // Which may be the average just stored.
        const V to = extras.anchor ? load<V>(extras.anchor + lane) : V{};
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

template <RuleVariant kVariant, class M>
AIM_INLINE void begin_block(const PackedStep<kVariant>& s, M& moments, int64_t at) {
  if (s.keeps_m()) moments.begin(kFirstMoment, at);
  if (s.keeps_v()) moments.begin(kSecondMoment, at);
  if (s.keeps_w()) moments.begin(kExtraMoment, at);
}

template <RuleVariant kVariant, class M>
AIM_INLINE void flush_block(const PackedStep<kVariant>& s, M& moments, int64_t at) {
  if (s.keeps_m()) moments.flush(kFirstMoment, at);
  if (s.keeps_v()) moments.flush(kSecondMoment, at);
  if (kVariant == RuleVariant::kAmsgrad) moments.flush(kExtraMoment, at);
}

template <RuleVariant kVariant, class M>
AIM_INLINE void end_block(const PackedStep<kVariant>& s, const M& moments) {
  if (s.keeps_m()) moments.end(kFirstMoment);
  if (s.keeps_v()) moments.end(kSecondMoment);
  if (kVariant == RuleVariant::kAmsgrad) moments.end(kExtraMoment);
}

// The block of 128 elements from `at` on, of which `filled` are there: sums go to `sums`, of the
// last 16, if some of them are not there, to `ends`. The others are computed and stored.
template <RuleVariant kVariant, class M>
AIM_INLINE void step_block(const PackedStep<kVariant>& s, M moments, int64_t at, int filled,
                           PackedBlock& b, PackedBits& bits, Sums<float>& sums, Sums<float>& ends) {
  BufferedWeights weights(s.tensor, at);
  begin_block(s, moments, at);
  if (s.shared.has_noise) {
    draw_noise(s.shared, s.tensor.first + at, filled, b.noise);
    // What is behind the last element stays zero, or it might be the greatest.
    for (int i = filled; i < kPackedBlock; ++i) b.noise[i] = 0;
  }
  const int body = filled / kLanes * kLanes, end = body < filled ? body + kLanes : body;
  // Twice around rather than written twice: the code would be as much larger.
  for (int part = body ? 0 : 1; part < (end > body ? 2 : 1); ++part) {
    accumulate_block(s, part ? body : 0, part ? end : body, weights, moments, b,
                     part ? ends : sums);
  }
  flush_block(s, moments, at);
  const BlockExtras extras(s, moments, at, bits);
  for (int part = body ? 0 : 1; part < (end > body ? 2 : 1); ++part) {
    apply_block(s, part ? body : 0, part ? end : body, weights, moments, b, extras,
                part ? ends : sums);
  }
  end_block(s, moments);
  if (kVariant == RuleVariant::kRms && s.keeps_w()) {
    for (int i = filled; i < end; ++i) b.w[i] = 0;  // 0 / 0, where eps is
    for (int i = 0; i < end; i += kStep) moments.gather(kExtraMoment, load<FloatVector>(b.w + i));
    moments.flush(kExtraMoment, at);
    for (int i = 0; i < end; i += kStep) {
      moments.keep(kExtraMoment, i, load<FloatVector>(b.w + i), extras.bits(moments, i));
    }
    moments.end(kExtraMoment);
  }
  weights.finish(s.shared, bits.weights);
}

// The blocks of [begin, end), of which the last may not be whole. A function of its own: that last
// one is a copy, and the code of a block would be there twice.
template <RuleVariant kVariant, class M>
__attribute__((noinline)) void step_each(const PackedStep<kVariant>& s, const M& moments,
                                         int64_t begin, int64_t end, PackedBlock& b,
                                         PackedBits& bits, Sums<float>& sums, Sums<float>& ends) {
  for (int64_t at = begin; at < end; at += kPackedBlock) {
    const int filled = static_cast<int>(end - at < kPackedBlock ? end - at : kPackedBlock);
    step_block(s, moments, at, filled, b, bits, sums, ends);
  }
}

// The same of whole blocks whose weights lie in memory. The moments of the next are computed before
// those of one are stored: exponents and random bits come long after what they are made of.
template <RuleVariant kVariant, class W, class M>
AIM_INLINE void step_blocks(const PackedStep<kVariant>& s, const M& moments, int64_t begin,
                            int64_t end, PackedBlock (&b)[2], PackedBits& bits, Sums<float>& sums) {
  M next = moments;
  BlockExtras extras;
  for (int64_t at = begin; at <= end; at += kPackedBlock) {
    const int64_t before = at - kPackedBlock;
    M now = next;
    if (at < end) {
      W weights(s.tensor, at);
      next = moments;
      begin_block(s, next, at);
      PackedBlock& into = b[at / kPackedBlock % 2];
      if (s.u.coupled || s.u.routed) {
        accumulate_block(s, 0, kPackedBlock, weights, next, into, sums);
      } else {
        accumulate_block<kVariant, true>(s, 0, kPackedBlock, weights, next, into, sums);
      }
      flush_block(s, next, at);
    }
    if (before >= begin) {
      W weights(s.tensor, before);
      PackedBlock& from = b[before / kPackedBlock % 2];
      if (extras.ema) {
        apply_block(s, 0, kPackedBlock, weights, now, from, extras, sums);
      } else {
        apply_block<kVariant, true>(s, 0, kPackedBlock, weights, now, from, extras, sums);
      }
      end_block(s, now);
    }
    if (at < end) extras = BlockExtras(s, next, at, bits);
  }
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
template <RuleVariant kVariant, class M>
__attribute__((noinline)) void step_last_block(const Tensor& tensor, const Shared& shared,
                                               int64_t at, int filled, PackedBlock& b,
                                               PackedBits& bits, Sums<float>& sums,
                                               Sums<float>& ends) {
  PaddedBlock last(tensor, at, filled);
  const PackedStep<kVariant> rest(last.padded, shared);
  step_each(rest, M(last.padded), 0, filled, b, bits, sums, ends);
  last.put_back();
}

template <RuleVariant kVariant, class W, class M>
void update_packed(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                   Partial* partial) {
  const PackedStep<kVariant> whole(tensor, shared);
  const M moments(tensor);
  PackedBlock b[2]{};
  PackedBits bits;
  Partial total{};
  for (int64_t tile = begin; tile < end; tile += kConvertedTile) {
    const int64_t tile_end = end - tile < kConvertedTile ? end : tile + kConvertedTile;
    Sums<float> sums{}, ends{};
    const int64_t blocks_end = tile + (tile_end - tile) / kPackedBlock * kPackedBlock;
    if constexpr (W::kDirect) {
      step_blocks<kVariant, W>(whole, moments, tile, blocks_end, b, bits, sums);
    } else {
      step_each(whole, moments, tile, blocks_end, b[0], bits, sums, ends);
    }
    const int filled = static_cast<int>(tile_end - blocks_end);
    if (filled) {
      step_last_block<kVariant, typename M::Any>(tensor, shared, blocks_end, filled, b[0], bits,
                                                 sums, ends);
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
      moments.begin(kFirstMoment, 0);
      moments.begin(kSecondMoment, 0);
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
        const bool under = !classed || is_under(m[i], v[i], u.old_c_v, u.old_c_0);
        const float live =
            live_weight(theta[i], anchor ? anchor[i] : 0.0f, u.live[under ? kUnder : kWell]);
        static_cast<S*>(tensor.param)[at + i] = narrowed_to(live, S{});
      }
    });
  }
}

}  // namespace AIM_ISA
}  // namespace aim
