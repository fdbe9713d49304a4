// What all elements of a tensor share in one step: computed once in float64, rounded once to the
// arithmetic type.
#pragma once

namespace aim {

// Which moments a parameter keeps, and with which update.
enum class Kind { kAdam, kSgd, kSgdMomentum, kSgdState, kSgdMomentumState };

// Pairs are {under, well}.
template <class T>
struct Uniforms {
  T scale, coupled_decay, decay;
  T grad[2], step[2], live[2];  // step: learning rate included
  T sigma;
  T first_keep, first_add;       // m = first_keep * m + first_add * g
  T second_keep, second_add;     // v = second_keep * v + second_add * g^2
  T old_v, old_0, new_v, new_0;  // under: m^2 >= _v * v + _0
  T eps;                         // denominator: sqrt(v) + eps
  T nesterov;                    // direction: g + nesterov * m
  bool coupled, routed;          // whether coupled_decay, and grad, change anything
  bool is_nesterov;
  bool plain;  // whether the gradient enters the moments as it is
};

}  // namespace aim
