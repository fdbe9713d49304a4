// What all elements of a tensor share in one step: computed once in float64, rounded once to the
// arithmetic type.
#pragma once

#include "common/platform.h"

namespace aim {

// Which moments a parameter keeps, and with which update. kRms is Adagrad and RMSprop, which divide
// the gradient by a root.
enum class RuleVariant {
  kAdam,
  kAmsgrad,
  kSgd,
  kSgdMomentum,
  kSgdState,
  kSgdMomentumState,
  kRms,
  kLion
};

// Pairs are {under, well}.
template <class T>
struct Uniforms {
  T scale, coupled_decay, decay;
  T grad[2], step[2], live[2];  // step: learning rate included
  T sigma;
  T first_keep, first_add;    // m = first_keep * m + first_add * g
  T second_keep, second_add;  // v = second_keep * v + (second_add * g) * g
  T old_c_v, old_c_0;         // the old class: under where m^2 >= c_v * v + c_0
  T new_c_v, new_c_0;         // the new class
  T eps;                      // denominator: sqrt(v) + eps
  T nesterov;                 // direction: g + nesterov * m
  T lead_keep, lead_add;      // Lion's direction: sign of lead_keep * m + lead_add * g
  T extra_keep;               // RMSprop's momentum: w = extra_keep * w + direction
  T ema_keep, ema_add;        // average = ema_keep * average + ema_add * theta
  bool coupled, routed;       // whether coupled_decay, and grad, change anything
  bool is_nesterov, centered;
  bool buffered;  // whether RMSprop has momentum
  bool plain;     // whether the gradient enters the moments as it is
};

namespace AIM_ISA {

AIM_INLINE constexpr bool is_adam(RuleVariant variant) {
  return variant == RuleVariant::kAdam || variant == RuleVariant::kAmsgrad;
}
AIM_INLINE constexpr bool has_first(RuleVariant variant) { return variant != RuleVariant::kSgd; }
AIM_INLINE constexpr bool has_second(RuleVariant variant) {
  return variant != RuleVariant::kSgd && variant != RuleVariant::kSgdMomentum;
}
AIM_INLINE constexpr bool has_extra(RuleVariant variant) {
  return variant == RuleVariant::kAmsgrad || variant == RuleVariant::kRms;
}
// Variants of which some groups lack a moment: its pointer is then null, its value 0, and it is not
// stored. One kernel serves them all.
AIM_INLINE constexpr bool may_lack(RuleVariant variant) {
  return variant == RuleVariant::kRms || variant == RuleVariant::kLion;
}
// SGD's buffer is the first moment.
AIM_INLINE constexpr bool has_buffer(RuleVariant variant) {
  return variant == RuleVariant::kSgdMomentum || variant == RuleVariant::kSgdMomentumState;
}
// A square root and a division make the direction.
AIM_INLINE constexpr bool has_root(RuleVariant variant) {
  return is_adam(variant) || variant == RuleVariant::kRms;
}

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
          map(u.old_c_v),
          map(u.old_c_0),
          map(u.new_c_v),
          map(u.new_c_0),
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
