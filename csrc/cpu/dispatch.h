// From a tensor's record to the kernel that knows its types, its rule and what it keeps.
#pragma once

#include "cpu/chunk.h"
#include "cpu/packed.h"

namespace aim {
namespace AIM_ISA {

using Update = void (*)(const Tensor&, const Shared&, int64_t, int64_t, Partial*);

template <RuleVariant kVariant, class S, class T>
Update update_of(bool noise, bool live) {
  if (noise)
    return live ? update_chunk<kVariant, true, true, S, T>
                : update_chunk<kVariant, true, false, S, T>;
  return live ? update_chunk<kVariant, false, true, S, T>
              : update_chunk<kVariant, false, false, S, T>;
}

// Adam without noise, of float32 and bfloat16 weights that are read and written where they lie, has
// loops of its own: with fewer bytes it is the instructions that count. Everything else shares one
// for each variant. Null: it is no such tensor.
template <class M>
Update fast_packed_of(const Tensor& tensor) {
  const bool live = tensor.master != nullptr;
  const DType dtype = static_cast<DType>(tensor.dtype);
  const Weights weights = static_cast<Weights>(tensor.weights);
  if (dtype == DType::kFloat32) {
    using W = DirectWeights<float>;
    return live ? update_packed<RuleVariant::kAdam, false, true, W, M>
                : update_packed<RuleVariant::kAdam, false, false, W, M>;
  }
  if (dtype != DType::kBFloat16) return nullptr;
  if (live || weights == Weights::kNearest) {
    using W = DirectWeights<BFloat16>;
    return live ? update_packed<RuleVariant::kAdam, false, true, W, M>
                : update_packed<RuleVariant::kAdam, false, false, W, M>;
  }
  if (weights == Weights::kSplit)
    return update_packed<RuleVariant::kAdam, false, false, SplitWeights, M>;
  return nullptr;
}

Update fast_of(const Tensor& tensor) {
  switch (static_cast<Moments>(tensor.moments)) {
    case Moments::kWide:
      // Plain float32 is faster in tiles; conversions and averages are not.
      if (static_cast<DType>(tensor.dtype) == DType::kFloat32 && !tensor.ema) return nullptr;
      return fast_packed_of<WideMoments>(tensor);
    case Moments::kBFloat16:
      return tensor.stochastic ? fast_packed_of<BFloat16Moments<1>>(tensor)
                               : fast_packed_of<BFloat16Moments<0>>(tensor);
    case Moments::kInt8:
      return fast_packed_of<Int8Moments<true>>(tensor);
  }
  return nullptr;
}

template <RuleVariant kVariant, class M>
Update packed_of(bool noise, bool live) {
  using W = BufferedWeights;
  if (noise) {
    return live ? update_packed<kVariant, true, true, W, M>
                : update_packed<kVariant, true, false, W, M>;
  }
  return live ? update_packed<kVariant, false, true, W, M>
              : update_packed<kVariant, false, false, W, M>;
}

template <RuleVariant kVariant>
Update packed_of(const Tensor& tensor, bool noise) {
  const bool live = tensor.master != nullptr;
  if (static_cast<Moments>(tensor.moments) == Moments::kInt8) {
    return packed_of<kVariant, Int8Moments<kVariant != RuleVariant::kAmsgrad>>(noise, live);
  }
  return packed_of<kVariant, BFloat16Moments<-1>>(noise, live);
}

template <RuleVariant kVariant, class S, class T>
void update_variant(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                    Partial* partial) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if constexpr (kVariant == RuleVariant::kAdam) {
      const Update fast = shared.has_noise ? nullptr : fast_of(tensor);
      if (fast) return fast(tensor, shared, begin, end, partial);
    }
    if (static_cast<Moments>(tensor.moments) != Moments::kWide) {
      return packed_of<kVariant>(tensor, shared.has_noise)(tensor, shared, begin, end, partial);
    }
  }
  update_of<kVariant, S, T>(shared.has_noise, tensor.master != nullptr)(tensor, shared, begin, end,
                                                                        partial);
}

template <class S, class T>
void update_type(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                 Partial* partial) {
  switch (shared.variant) {
    case RuleVariant::kAdam:
      return update_variant<RuleVariant::kAdam, S, T>(tensor, shared, begin, end, partial);
    case RuleVariant::kAmsgrad:
      return update_variant<RuleVariant::kAmsgrad, S, T>(tensor, shared, begin, end, partial);
    case RuleVariant::kSgd:
      return update_variant<RuleVariant::kSgd, S, T>(tensor, shared, begin, end, partial);
    case RuleVariant::kSgdMomentum:
      return update_variant<RuleVariant::kSgdMomentum, S, T>(tensor, shared, begin, end, partial);
    case RuleVariant::kSgdState:
      return update_variant<RuleVariant::kSgdState, S, T>(tensor, shared, begin, end, partial);
    case RuleVariant::kSgdMomentumState:
      return update_variant<RuleVariant::kSgdMomentumState, S, T>(tensor, shared, begin, end,
                                                                  partial);
    case RuleVariant::kRms:
      return update_variant<RuleVariant::kRms, S, T>(tensor, shared, begin, end, partial);
    case RuleVariant::kLion:
      return update_variant<RuleVariant::kLion, S, T>(tensor, shared, begin, end, partial);
  }
}

void update_any(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                Partial* partial) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kFloat32:
      return update_type<float, float>(tensor, shared, begin, end, partial);
    case DType::kFloat64:
      return update_type<double, double>(tensor, shared, begin, end, partial);
    case DType::kBFloat16:
      return update_type<BFloat16, float>(tensor, shared, begin, end, partial);
    case DType::kFloat16:
      return update_type<Float16, float>(tensor, shared, begin, end, partial);
  }
}

template <class S, class T>
void emit_type(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    switch (static_cast<Moments>(tensor.moments)) {
      case Moments::kWide:
        break;
      case Moments::kBFloat16:
        return emit_packed<BFloat16Moments<0>>(tensor, shared, begin, end);
      case Moments::kInt8:
        return emit_packed<Int8Moments<true>>(tensor, shared, begin, end);
    }
  }
  emit_chunk<S, T>(tensor, shared, begin, end);
}

void emit_any(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kFloat32:
      return emit_type<float, float>(tensor, shared, begin, end);
    case DType::kFloat64:
      return emit_type<double, double>(tensor, shared, begin, end);
    case DType::kBFloat16:
      return emit_type<BFloat16, float>(tensor, shared, begin, end);
    case DType::kFloat16:
      return emit_type<Float16, float>(tensor, shared, begin, end);
  }
}

template <class S, class T>
void adopt_type(const Tensor& tensor, int64_t begin, int64_t end) {
  adopt_edits(static_cast<const S*>(tensor.param) + begin, end - begin,
              static_cast<T*>(tensor.master) + begin);
}

void adopt_any(const Tensor& tensor, int64_t begin, int64_t end) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kFloat32:
      return adopt_type<float, float>(tensor, begin, end);
    case DType::kFloat64:
      return adopt_type<double, double>(tensor, begin, end);
    case DType::kBFloat16:
      return adopt_type<BFloat16, float>(tensor, begin, end);
    case DType::kFloat16:
      return adopt_type<Float16, float>(tensor, begin, end);
  }
}

}  // namespace AIM_ISA
}  // namespace aim
