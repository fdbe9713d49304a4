// From a tensor's record to the kernel that knows its types, its rule and what it keeps.
#pragma once

#include "cpu/packed.h"
#include "cpu/update.h"

namespace aim {
namespace AIM_ISA {

using Update = void (*)(const Tensor&, const Shared&, int64_t, int64_t, Partial*);

// Adam without noise, of float32 and bfloat16 weights that are read and written where they lie, has
// loops of its own: with fewer bytes it is the instructions that count. Everything else shares one
// for each variant. Null: it is no such tensor.
template <class M>
Update fast_packed_of(const Tensor& tensor) {
  const bool live = tensor.master != nullptr;
  const DType dtype = static_cast<DType>(tensor.dtype);
  const Weights weights = static_cast<Weights>(tensor.weights);
  if (dtype == DType::kFloat32) {
    return live ? update_packed<RuleVariant::kAdam, DirectWeights<float, true>, M>
                : update_packed<RuleVariant::kAdam, DirectWeights<float, false>, M>;
  }
  if (dtype != DType::kBFloat16) return nullptr;
  if (live || weights == Weights::kNearest) {
    return live ? update_packed<RuleVariant::kAdam, DirectWeights<BFloat16, true>, M>
                : update_packed<RuleVariant::kAdam, DirectWeights<BFloat16, false>, M>;
  }
  if (weights == Weights::kSplit) return update_packed<RuleVariant::kAdam, SplitWeights, M>;
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

// A variant without moments does not care how they are stored.
template <RuleVariant kVariant>
Update packed_of(const Tensor& tensor) {
  if constexpr (has_first(kVariant)) {
    if (static_cast<Moments>(tensor.moments) == Moments::kInt8) {
      return update_packed<kVariant, BufferedWeights,
                           Int8Moments<kVariant != RuleVariant::kAmsgrad>>;
    }
  }
  return update_packed<kVariant, BufferedWeights, BFloat16Moments<-1>>;
}

// Null: it is a tensor for update_chunk().
Update packed_of(const Tensor& tensor, const Shared& shared) {
  if (shared.variant == RuleVariant::kAdam && !shared.has_noise) {
    if (const Update fast = fast_of(tensor)) return fast;
  }
  if (static_cast<Moments>(tensor.moments) == Moments::kWide) return nullptr;
  switch (shared.variant) {
    case RuleVariant::kAdam:
      return packed_of<RuleVariant::kAdam>(tensor);
    case RuleVariant::kAmsgrad:
      return packed_of<RuleVariant::kAmsgrad>(tensor);
    case RuleVariant::kSgd:
      return packed_of<RuleVariant::kSgd>(tensor);
    case RuleVariant::kSgdMomentum:
      return packed_of<RuleVariant::kSgdMomentum>(tensor);
    case RuleVariant::kSgdState:
      return packed_of<RuleVariant::kSgdState>(tensor);
    case RuleVariant::kSgdMomentumState:
      return packed_of<RuleVariant::kSgdMomentumState>(tensor);
    case RuleVariant::kRms:
      return packed_of<RuleVariant::kRms>(tensor);
    case RuleVariant::kLion:
      return packed_of<RuleVariant::kLion>(tensor);
  }
  return nullptr;
}

template <class S, class T>
void update_type(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                 Partial* partial) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (const Update packed = packed_of(tensor, shared)) {
      return packed(tensor, shared, begin, end, partial);
    }
  }
  update_chunk<S, T>(tensor, shared, begin, end, partial);
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
