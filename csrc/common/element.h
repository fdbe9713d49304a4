// The arithmetic of one element, once for all devices. V is a float, a double or a vector of them; the order of operations is
// that of docs/design.md, and no compiler may contract it (-ffp-contract=off, -fmad=false).
//
// square_root() must be declared for V before this header is included (scalar.h does it for float and double).
#pragma once

#include "common/scalar.h"
#include "common/uniforms.h"

namespace aim {
namespace AIM_ISA {

constexpr bool has_first(Kind kind) { return kind != Kind::kSgd; }
constexpr bool has_second(Kind kind) {
  return kind == Kind::kAdam || kind == Kind::kSgdState || kind == Kind::kSgdMomentumState;
}
// The update direction is made of the first moment.
constexpr bool has_momentum(Kind kind) {
  return kind == Kind::kAdam || kind == Kind::kSgdMomentum || kind == Kind::kSgdMomentumState;
}

template <class M, class V>
AIM_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

template <class V, class T>
AIM_INLINE V splat(T x) {
  return x - V{};
}

template <class V, class T>
AIM_INLINE auto is_under(V m, V v, T slope, T offset) {
  return m * m >= v * slope + offset;
}

// anchor + (theta - anchor) * c; theta itself, to the bit, where c is one.
template <class V>
AIM_INLINE V live_weight(V theta, V anchor, V c) {
  return select(c == splat<V>(1.0f), theta, anchor + (theta - anchor) * c);
}

template <class V>
struct Element {
  V theta, grad, m, v;  // in: before the step; out: after it (grad: scaled, as the statistics see it)
  V delta;              // out: what step 5 subtracts
  V coefficient;        // out: live coefficient of the new class
};

// Steps 1 to 5 on one element (vector). Returns the new class (no meaning where no state is kept).
template <Kind kKind, bool kNoise, class T, class V>
AIM_INLINE auto update(const Uniforms<T>& u, Element<V>& e, V noise) {
  const V g0 = e.grad * u.scale;
  e.grad = g0;
  V g = g0 + e.theta * u.coupled_decay;
  if constexpr (has_second(kKind)) {
    const auto old = is_under(e.m, e.v, u.old_v, u.old_0);
    g = g * select(old, splat<V>(u.grad[0]), splat<V>(u.grad[1]));
  } else {
    g = g * u.grad[0];
  }
  if constexpr (kNoise) g = g + noise * u.sigma;

  if constexpr (has_first(kKind)) e.m = e.m * u.first_keep + g * u.first_add;
  if constexpr (has_second(kKind)) e.v = e.v * u.second_keep + (g * g) * u.second_add;

  auto under = e.theta == e.theta;  // any mask: without state both classes have equal coefficients
  if constexpr (has_second(kKind)) under = is_under(e.m, e.v, u.new_v, u.new_0);

  V direction = g;
  if constexpr (kKind == Kind::kAdam) {
    direction = e.m / (square_root(e.v) * u.root_scale + u.eps);
  } else if constexpr (has_momentum(kKind)) {
    direction = u.nesterov != T{0} ? g + e.m * u.nesterov : e.m;
  }
  e.delta = direction * select(under, splat<V>(u.step[0]), splat<V>(u.step[1]));
  e.theta = e.theta * u.decay - e.delta;
  e.coefficient = select(under, splat<V>(u.live[0]), splat<V>(u.live[1]));
  return under;
}

}  // namespace AIM_ISA
}  // namespace aim
