// What all elements of a tensor share in one step: computed once in float64, rounded once to the
// arithmetic type.
#pragma once

#include "common/platform.h"

namespace aim {

// Which moments a parameter keeps, and with which update. kRms is Adagrad and RMSprop, which divide
// the gradient by a root.
enum class Kind { kAdam, kAmsgrad, kSgd, kSgdMomentum, kSgdState, kSgdMomentumState, kRms, kLion };

// Pairs are {under, well}.
template <class T>
struct Uniforms {
  T scale, coupled_decay, decay;
  T grad[2], step[2], live[2];  // step: learning rate included
  T sigma;
  T first_keep, first_add;       // m = first_keep * m + first_add * g
  T second_keep, second_add;     // v = second_keep * v + (second_add * g) * g
  T old_v, old_0, new_v, new_0;  // under: m^2 >= _v * v + _0
  T eps;                         // denominator: sqrt(v) + eps
  T nesterov;                    // direction: g + nesterov * m
  T lead_keep, lead_add;         // Lion's direction: sign of lead_keep * m + lead_add * g
  T extra_keep;                  // RMSprop's momentum: w = extra_keep * w + direction
  T ema_keep, ema_add;           // average = ema_keep * average + ema_add * theta
  bool coupled, routed;          // whether coupled_decay, and grad, change anything
  bool is_nesterov, centered;
  bool buffered;  // whether RMSprop has momentum
  bool plain;     // whether the gradient enters the moments as it is
};

namespace AIM_ISA {

AIM_INLINE constexpr bool is_adam(Kind kind) {
  return kind == Kind::kAdam || kind == Kind::kAmsgrad;
}
AIM_INLINE constexpr bool has_first(Kind kind) { return kind != Kind::kSgd; }
AIM_INLINE constexpr bool has_second(Kind kind) {
  return kind != Kind::kSgd && kind != Kind::kSgdMomentum;
}
AIM_INLINE constexpr bool has_extra(Kind kind) {
  return kind == Kind::kAmsgrad || kind == Kind::kRms;
}
// Kinds of which some groups lack a moment: its pointer is then null, its value 0, and it is not
// stored. One kernel serves them all.
AIM_INLINE constexpr bool may_lack(Kind kind) { return kind == Kind::kRms || kind == Kind::kLion; }
// SGD's buffer is the first moment.
AIM_INLINE constexpr bool has_buffer(Kind kind) {
  return kind == Kind::kSgdMomentum || kind == Kind::kSgdMomentumState;
}
// A square root and a division make the direction.
AIM_INLINE constexpr bool has_root(Kind kind) { return is_adam(kind) || kind == Kind::kRms; }

// Every value of `u` through `map`.
template <class To, class From, class Map>
AIM_INLINE Uniforms<To> mapped(const Uniforms<From>& u, const Map& map) {
  return {map(u.scale),
          map(u.coupled_decay),
          map(u.decay),
          {map(u.grad[0]), map(u.grad[1])},
          {map(u.step[0]), map(u.step[1])},
          {map(u.live[0]), map(u.live[1])},
          map(u.sigma),
          map(u.first_keep),
          map(u.first_add),
          map(u.second_keep),
          map(u.second_add),
          map(u.old_v),
          map(u.old_0),
          map(u.new_v),
          map(u.new_0),
          map(u.eps),
          map(u.nesterov),
          map(u.lead_keep),
          map(u.lead_add),
          map(u.extra_keep),
          map(u.ema_keep),
          map(u.ema_add),
          u.coupled,
          u.routed,
          u.is_nesterov,
          u.centered,
          u.buffered,
          u.plain};
}

template <class T>
AIM_INLINE Uniforms<T> rounded(const Uniforms<double>& u) {
  return mapped<T>(u, [](double x) { return static_cast<T>(x); });
}

}  // namespace AIM_ISA
}  // namespace aim
