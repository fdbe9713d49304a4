// From a tensor's record to the kernel that knows its types, its rule and what it keeps.
#pragma once

#include "cpu/chunk.h"
#include "cpu/packed.h"

namespace aim {
namespace AIM_ISA {

using Update = void (*)(const Tensor&, const Shared&, int64_t, int64_t, Partial*);

template <Kind kKind, class S, class T>
Update update_of(bool noise, bool live) {
  if (noise)
    return live ? update_chunk<kKind, true, true, S, T> : update_chunk<kKind, true, false, S, T>;
  return live ? update_chunk<kKind, false, true, S, T> : update_chunk<kKind, false, false, S, T>;
}

template <Kind kKind>
Update packed_of(bool noise, bool live) {
  if (noise) return live ? update_packed<kKind, true, true> : update_packed<kKind, true, false>;
  return live ? update_packed<kKind, false, true> : update_packed<kKind, false, false>;
}

template <Kind kKind, class S, class T>
void update_kind(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                 Partial* partial) {
  const bool live = tensor.master != nullptr;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (static_cast<Moments>(tensor.moments) != Moments::kWide) {
      return packed_of<kKind>(shared.has_noise, live)(tensor, shared, begin, end, partial);
    }
  }
  update_of<kKind, S, T>(shared.has_noise, live)(tensor, shared, begin, end, partial);
}

template <class S, class T>
void update_type(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                 Partial* partial) {
  switch (shared.kind) {
    case Kind::kAdam:
      return update_kind<Kind::kAdam, S, T>(tensor, shared, begin, end, partial);
    case Kind::kAmsgrad:
      return update_kind<Kind::kAmsgrad, S, T>(tensor, shared, begin, end, partial);
    case Kind::kSgd:
      return update_kind<Kind::kSgd, S, T>(tensor, shared, begin, end, partial);
    case Kind::kSgdMomentum:
      return update_kind<Kind::kSgdMomentum, S, T>(tensor, shared, begin, end, partial);
    case Kind::kSgdState:
      return update_kind<Kind::kSgdState, S, T>(tensor, shared, begin, end, partial);
    case Kind::kSgdMomentumState:
      return update_kind<Kind::kSgdMomentumState, S, T>(tensor, shared, begin, end, partial);
    case Kind::kRms:
      return update_kind<Kind::kRms, S, T>(tensor, shared, begin, end, partial);
    case Kind::kLion:
      return update_kind<Kind::kLion, S, T>(tensor, shared, begin, end, partial);
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
    if (static_cast<Moments>(tensor.moments) != Moments::kWide) {
      return emit_packed(tensor, shared, begin, end);
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

}  // namespace AIM_ISA
}  // namespace aim
