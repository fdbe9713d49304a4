// Gradients and weights of one block of 128 elements, in all their types.
#pragma once

#include <type_traits>

#include "cpu/codec.h"

namespace aim {
namespace AIM_ISA {

// Gradients and weights of a block as they lie in memory, for types that one instruction converts.
template <class S, bool kMaster>
struct DirectWeights {
  static constexpr bool kDirect = true;
  static AIM_INLINE constexpr bool has_live() { return kMaster; }
  const S* grad;
  float* theta;  // where true weights are float32; null: they are in `param`
  S* param;

  DirectWeights(const Tensor& t, int64_t at)
      : grad(static_cast<const S*>(t.grad) + at),
        theta(t.master ? static_cast<float*>(t.master) + at : nullptr),
        param(static_cast<S*>(t.param) + at) {}
  AIM_INLINE FloatVector read_grad(int i) const { return read(grad + i); }
  AIM_INLINE FloatVector read_theta(int i) const {
    return kMaster ? load<FloatVector>(theta + i) : read(param + i);
  }
  AIM_INLINE void keep_theta(int i, FloatVector x) const {
    kMaster ? store(theta + i, x) : write(param + i, x);
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
  static AIM_INLINE constexpr bool has_live() { return false; }
  const uint16_t* grad;
  uint16_t *upper, *rest;

  SplitWeights(const Tensor& t, int64_t at)
      : grad(static_cast<const uint16_t*>(t.grad) + at),
        upper(static_cast<uint16_t*>(t.param) + at),
        rest(static_cast<uint16_t*>(t.rest) + at) {}
  AIM_INLINE FloatVector read_grad(int i) const { return as_float(from_small(grad + i) << 16); }
  AIM_INLINE FloatVector read_theta(int i) const {
    return as_float(joined_bits(from_small(upper + i), from_small(rest + i)));
  }
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
  AIM_INLINE bool has_live() const { return tensor.master != nullptr; }
  alignas(64) float grad[kPackedBlock], theta[kPackedBlock], live[kPackedBlock];

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
  AIM_INLINE FloatVector read_theta(int i) const { return load<FloatVector>(theta + i); }
  AIM_INLINE void keep_theta(int i, FloatVector x) { store(theta + i, x); }
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

}  // namespace AIM_ISA
}  // namespace aim
