// The arithmetic of one element, once for all devices. V is a float, a double or a vector of them;
// the order of operations is that of docs/design.md, and no compiler may contract it
// (-ffp-contract=off, -fmad=false).
//
// square_root() must be declared for V before this header is included (scalar.h does it for float
// and double).
#pragma once

#include "common/scalar.h"
#include "common/uniforms.h"

namespace aim {
namespace AIM_ISA {

template <class V>
AIM_INLINE auto is_under(V m, V v, V c_v, V c_0) {
  return m * m >= v * c_v + c_0;
}

// anchor + (theta - anchor) * c; theta itself, to the bit, where c is one.
template <class V>
AIM_INLINE V live_weight(V theta, V anchor, V c) {
  return select(c == splat<V>(1.0f), theta, anchor + (theta - anchor) * c);
}

// With sign(0) = 0 and the sign of a NaN a NaN.
template <class V>
AIM_INLINE V sign(V x) {
  return select(x > V{}, splat<V>(1.0f), select(x < V{}, splat<V>(-1.0f), x));
}

// What a vector of elements hands from steps 1-3 to steps 4-6.
template <class V>
struct StepTerms {
  // Of the update direction. Adam's numerator is m, which is in memory anyway; some variants divide
  // by nothing.
  V numerator, denominator;
  V step, live;  // coefficients of the new class; live only where live weights are written
};

// Steps 1 to 3 and the update direction. `grad` becomes g0, the gradient that the statistics see.
// kPlain promises u.plain. `w` is the extra moment; only AMSGrad's moves here.
template <RuleVariant kVariant, bool kPlain, bool kNoise, class V>
AIM_INLINE void accumulate(const Uniforms<V>& u, V theta, V& grad, V& m, V& v, V& w, V noise,
                           StepTerms<V>& out) {
  if constexpr (!kPlain) grad = grad * u.scale;
  V g = grad;
  if constexpr (!kPlain) {
    if (u.coupled) g = g + theta * u.coupled_decay;
    if (u.routed) {
      if constexpr (has_second(kVariant)) {
        g = g * select(is_under(m, v, u.old_c_v, u.old_c_0), u.grad[0], u.grad[1]);
      } else {
        g = g * u.grad[0];
      }
    }
  }
  if constexpr (kNoise) g = g + noise * u.sigma;

  if constexpr (kVariant == RuleVariant::kLion)
    out.numerator = sign(m * u.lead_keep + g * u.lead_add);
  if constexpr (has_first(kVariant)) m = m * u.first_keep + g * u.first_add;
  if constexpr (has_second(kVariant)) v = v * u.second_keep + (u.second_add * g) * g;

  if constexpr (kVariant == RuleVariant::kAmsgrad) w = select(w > v, w, v);
  if constexpr (has_root(kVariant)) {
    V below = kVariant == RuleVariant::kAmsgrad ? w : v;
    if constexpr (kVariant == RuleVariant::kRms) {
      if (u.centered) {
        const V variance = v - m * m;  // negative by rounding only
        below = select(variance < V{}, V{}, variance);
        // Where both squares overflow, that of a finite mean counts for nothing.
        below = select(variance != variance, v + (m - m), below);
      }
    }
    out.denominator = square_root(below) + u.eps;
  }
  if constexpr (has_buffer(kVariant)) {
    out.numerator = u.is_nesterov ? g + m * u.nesterov : m;
  } else if constexpr (!is_adam(kVariant) && kVariant != RuleVariant::kLion) {
    out.numerator = g;
  }
}

// The new class, of moments as they are stored, and what goes by it. Returns the mask of the
// under-optimized (no meaning where no state is kept).
template <RuleVariant kVariant, bool kLive, class V>
AIM_INLINE auto classify(const Uniforms<V>& u, V m, V v, StepTerms<V>& out) {
  auto under = m == m;  // any mask: without state both classes have equal coefficients
  if constexpr (has_second(kVariant)) under = is_under(m, v, u.new_c_v, u.new_c_0);
  out.step = select(under, u.step[0], u.step[1]);
  if constexpr (kLive) out.live = select(under, u.live[0], u.live[1]);
  return under;
}

// Steps 4 and 5. Returns delta, what was subtracted. Of the extra moments only RMSprop's buffer `w`
// moves here.
template <RuleVariant kVariant, class V>
AIM_INLINE V apply(const Uniforms<V>& u, const StepTerms<V>& in, V& w, V& theta) {
  V direction = in.numerator;
  if constexpr (has_root(kVariant)) direction = direction / in.denominator;
  if constexpr (kVariant == RuleVariant::kRms) {
    if (u.buffered) direction = w = w * u.extra_keep + direction;
  }
  const V delta = direction * in.step;
  theta = theta * u.decay - delta;
  return delta;
}

}  // namespace AIM_ISA
}  // namespace aim
