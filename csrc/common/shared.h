// From tables to what a tensor's elements share in one step, and from sums to the next threshold:
// the float64 arithmetic around the elements, once for all devices. Only +, -, *, / and sqrt, so
// that every device computes the same bits.
#pragma once

#include "aim/step.h"
#include "common/philox.h"
#include "common/scalar.h"
#include "common/uniforms.h"

namespace aim {

// Kernels round `u` once to their arithmetic type.
struct Shared {
  Uniforms<double> u;
  RuleVariant variant;
  bool has_noise;
  uint64_t seed;
  uint32_t counter;
};

namespace AIM_ISA {

AIM_INLINE RuleVariant variant_of(const Tensor& tensor, const Group& group) {
  const bool momentum = group.momentum != 0;
  switch (static_cast<Rule>(group.rule)) {
    case Rule::kAdamW:
    case Rule::kAdam:
      return group.flags & kAmsgrad ? RuleVariant::kAmsgrad : RuleVariant::kAdam;
    case Rule::kSgd:
      if (tensor.exp_avg_sq)
        return momentum ? RuleVariant::kSgdMomentumState : RuleVariant::kSgdState;
      return momentum ? RuleVariant::kSgdMomentum : RuleVariant::kSgd;
    case Rule::kAdagrad:
    case Rule::kRmsprop:
      return RuleVariant::kRms;
    case Rule::kLion:
      return RuleVariant::kLion;
  }
  return RuleVariant::kSgd;
}

// Both moments, so that elements have a class.
AIM_INLINE bool has_classes(const Tensor& tensor, RuleVariant variant) {
  return has_first(variant) && has_second(variant) &&
         (!may_lack(variant) || (tensor.exp_avg && tensor.exp_avg_sq));
}

// A number as the unevaluated sum of two doubles, good to about 104 bits.
struct Wide {
  double high, low;
};

// By Dekker's product ("A floating-point technique for extending the available precision", 1971),
// which needs no FMA.
AIM_INLINE Wide multiply(Wide a, Wide b) {
  constexpr double kSplit = 134217729;  // 2^27 + 1: halves of 26 bits, whose products are exact
  const double a_part = kSplit * a.high, b_part = kSplit * b.high;
  const double a_upper = a_part - (a_part - a.high), a_lower = a.high - a_upper;
  const double b_upper = b_part - (b_part - b.high), b_lower = b.high - b_upper;
  const double product = a.high * b.high;
  double error =
      ((a_upper * b_upper - product) + a_upper * b_lower + a_lower * b_upper) + a_lower * b_lower;
  error = error + (a.high * b.low + a.low * b.high);
  const double high = product + error;
  return {high, error - (high - product)};
}

// x^n and y^k for whole n and k (negative ones count as 0), by squaring: the libraries of different
// devices round pow() differently. In two doubles, since 1 - beta^t would show the errors of plain
// squaring in float64. One loop for both, so that neither chain of products waits for the other.
AIM_INLINE void powers(double x, double n, double y, double k, double* x_to_n, double* y_to_k) {
  Wide a{1, 0}, b{1, 0}, x_square{x, 0}, y_square{y, 0};
  uint64_t n_rest = n > 0 ? static_cast<uint64_t>(n) : 0;
  uint64_t k_rest = k > 0 ? static_cast<uint64_t>(k) : 0;
  while ((n_rest | k_rest) != 0) {
    const Wide a_next = multiply(a, x_square), b_next = multiply(b, y_square);
    if (n_rest & 1) a = a_next;
    if (k_rest & 1) b = b_next;
    x_square = multiply(x_square, x_square);
    y_square = multiply(y_square, y_square);
    n_rest >>= 1;
    k_rest >>= 1;
  }
  *x_to_n = a.high;
  *y_to_k = b.high;
}

// Of moments that are `t` >= 1 steps old: the total weight of the gradients in the first, and of
// their squares in the second (1 - beta2^t; Adagrad: t).
struct Age {
  double weight, rest;
};

AIM_INLINE Age age_of(const Group& group, RuleVariant variant, double t) {
  const bool buffer = has_buffer(variant);
  const double mu = group.momentum;
  double last, squared;
  powers(buffer                          ? mu
         : variant == RuleVariant::kLion ? group.beta2
                                         : group.beta1,
         buffer ? t - 1 : t, group.beta2, t, &last, &squared);
  if (static_cast<Rule>(group.rule) == Rule::kAdagrad) squared = 1 - t;
  if (!buffer) return {1 - last, 1 - squared};
  const double earlier = mu == 1 ? t - 1 : (1 - last) / (1 - mu);
  return {last + (1 - group.dampening) * earlier, 1 - squared};
}

// Of kFisher: so steep that m^2, which is less than 2^24 times v, is nothing beside one rounding of
// v, and small enough for float32: steeper than 2^80, ordinary second moments would overflow.
inline constexpr double kSteep = 0x1p80;

// The class boundary of moments of that age: under-optimized where m^2 >= c_v * v + c_0. kFisher:
// v_hat >= c, as m^2 >= kSteep * (c - v_hat); kGrad: m_hat^2 >= c; c = (tau / (1 - tau))^16.
AIM_INLINE void boundary(const Group& group, const Age& age, double tau, double* c_v, double* c_0) {
  if (group.flags & (kFisher | kGrad)) {
    double c = tau / (1 - tau);
    for (int doubled = 0; doubled < 4; ++doubled) c = c * c;
    const bool fisher = (group.flags & kFisher) != 0;
    *c_v = fisher ? -kSteep : 0;
    *c_0 = fisher ? c * age.rest * kSteep : c * (age.weight * age.weight);
    return;
  }
  const double squared = tau * tau * age.weight * age.weight;
  *c_v = squared / age.rest;
  *c_0 = squared * group.eps * group.eps;
}

AIM_INLINE void copy(const double from[2], double to[2]) {
  to[0] = from[0];
  to[1] = from[1];
}

// Whether a block stays as it is in this step: nothing of its gradient gets through and no update
// is applied. Moments that went on fading would change which elements are under-optimized.
AIM_INLINE bool is_held(const Row& row, const PhaseRow& now) {
  return row.grad[kUnder] == 0 && row.grad[kWell] == 0 && now.step[kUnder] == 0 &&
         now.step[kWell] == 0;
}

// Moments and weights come out as they went in; the gradient is multiplied by zero anyway.
AIM_INLINE void hold(Uniforms<double>* u) {
  u->decay = u->first_keep = u->second_keep = u->extra_keep = 1;
  u->sigma = 0;
}

// What a step of a tensor depends on, its elements aside.
struct StepContext {
  const Group& group;
  const Row& row;
  const PhaseRow& now;   // of the phase at hand
  const PhaseRow& next;  // of the live weights that the step writes
  const Control& control;
  RuleVariant variant;
  bool classed;  // has_classes() of the tensor
  double steps_taken;
  // The learning rate, and what multiplies the gradient first; on devices either may live in memory
  // that the host does not see.
  double lr, scale;
  double deviation;  // standard_deviation() of the group
};

AIM_INLINE Shared shared_of(const StepContext& context) {
  const Group& group = context.group;
  const Row& row = context.row;
  const RuleVariant variant = context.variant;
  const double steps_taken = context.steps_taken, lr = context.lr;
  Shared shared{};
  Uniforms<double>& u = shared.u;
  const bool held = is_held(row, context.now);
  const double t = held ? steps_taken : steps_taken + 1;
  const Rule rule = static_cast<Rule>(group.rule);
  const bool decoupled = rule == Rule::kAdamW || rule == Rule::kLion;
  u.scale = context.scale;
  u.coupled_decay = decoupled ? 0 : group.weight_decay;
  u.decay = decoupled ? 1 - lr * group.weight_decay : 1;
  copy(row.grad, u.grad);
  copy(context.next.live, u.live);
  u.sigma = row.noise != 0 ? row.noise * context.deviation : 0;
  u.routed = u.grad[kUnder] != 1 || u.grad[kWell] != 1;
  if (has_buffer(variant)) {
    u.first_keep = t > 1 ? group.momentum : 0;
    u.first_add = t > 1 ? 1 - group.dampening : 1;
  } else {
    u.first_keep = variant == RuleVariant::kLion ? group.beta2 : group.beta1;
    u.first_add = 1 - u.first_keep;
  }
  u.second_keep = rule == Rule::kAdagrad ? 1 : group.beta2;
  u.second_add = rule == Rule::kAdagrad ? 1 : 1 - group.beta2;
  u.lead_keep = group.beta1;
  u.lead_add = 1 - group.beta1;
  u.extra_keep = group.momentum;
  u.ema_keep = group.ema_decay;
  u.ema_add = 1 - group.ema_decay;
  u.eps = group.eps;
  double rate = rule == Rule::kAdagrad ? lr / (1 + steps_taken * group.lr_decay) : lr;
  if (held) hold(&u);
  if (context.classed && t >= 1) {
    const Age age = age_of(group, variant, t);
    boundary(group, age, row.tau, &u.new_c_v, &u.new_c_0);
    // Before the first step everything is under-optimized; without routing nobody asks.
    if (u.routed && steps_taken >= 1) {
      const Age old = age_of(group, variant, steps_taken);
      boundary(group, old, row.tau_prev, &u.old_c_v, &u.old_c_0);
    }
    if (is_adam(variant)) {
      // m_hat / (sqrt(v_hat) + eps) = m / (sqrt(v) + eps * root) * root / weight
      const double root = square_root(age.rest);
      rate *= root / age.weight;
      u.eps = group.eps * root;
    }
  }
  u.step[kUnder] = rate * context.now.step[kUnder];
  u.step[kWell] = rate * context.now.step[kWell];
  u.nesterov = group.nesterov ? group.momentum : 0;
  u.is_nesterov = group.nesterov != 0;
  u.buffered = rule == Rule::kRmsprop && group.momentum != 0;
  u.centered = (group.flags & kCentered) != 0;
  u.coupled = u.coupled_decay != 0;
  u.plain = u.scale == 1 && !u.coupled && !u.routed;
  shared.variant = variant;
  shared.has_noise = u.sigma != 0;
  shared.seed = static_cast<uint64_t>(context.control.seed);
  shared.counter = static_cast<uint32_t>(context.control.counter);
  return shared;
}

// A gradient ends it.
AIM_INLINE bool is_frozen(const Tensor& tensor) {
  return (tensor.flags & kFrozen) != 0 && !tensor.grad;
}

AIM_INLINE double steps_of(const Tensor& tensor) {
  return tensor.step ? static_cast<double>(*tensor.step) : 0.0;
}

// Whether the master has to take over what was written to the parameter.
AIM_INLINE bool adopts(const Tensor& tensor, const Row& row) {
  return (tensor.flags & kAdopts) != 0 && tensor.master && row.emitted[kUnder] == 1 &&
         row.emitted[kWell] == 1;
}

// What emit needs: live coefficients, and the class of the stored moments under `tau`.
AIM_INLINE Shared emission_of(const Tensor& tensor, const Group& group, RuleVariant variant,
                              bool classed, double tau, const double live[2]) {
  Shared shared{};
  copy(live, shared.u.live);
  if (is_frozen(tensor)) shared.u.live[kUnder] = live[kWell];
  const double steps_taken = steps_of(tensor);
  if (classed && steps_taken >= 1) {
    boundary(group, age_of(group, variant, steps_taken), tau, &shared.u.old_c_v, &shared.u.old_c_0);
  }
  shared.variant = variant;
  return shared;
}

AIM_INLINE double standard_deviation(const Statistics& s) {
  if (!(s.numel > 0)) return 0;
  const double mean = s.grad_sum / s.numel, variance = s.grad_sq / s.numel - mean * mean;
  return variance > 0 ? square_root(variance) : 0;
}

// The phase of the live weights that the step at hand will write.
AIM_INLINE int64_t draw_phase(const Control& control) {
  const Philox4 drawn = philox4x32(static_cast<uint64_t>(control.seed),
                                   {{0, 0, static_cast<uint32_t>(control.counter), kPhaseStream}});
  return static_cast<int64_t>(drawn.x[0]) < control.threshold ? 1 : 0;
}

// After a step that measured `s`: the threshold moves, unless the block was held, the gradient
// columns are latched.
AIM_INLINE void finish_row(const Group& group, const Statistics& s, bool held, int64_t next,
                           Row* row) {
  row->tau_prev = row->tau;
  if (s.numel > 0 && group.rate != 0 && s.under == s.under && !held) {
    const double moved = row->tau + group.rate * (s.under / s.numel - group.target);
    row->tau = moved < 0 ? 0 : moved > 1 ? 1 : moved;
  }
  copy(row->phases[next].grad, row->grad);
  copy(row->phases[next].live, row->emitted);
}

}  // namespace AIM_ISA
}  // namespace aim
