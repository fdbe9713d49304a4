// The sum of squares of one chunk's gradients, for the instruction set of the including translation
// unit. Summed in 16 lanes, as the statistics are: every instruction set gives the same bits.
#pragma once

#include "cpu/update.h"

namespace aim {
namespace AIM_ISA {

template <class T>
double squares_of(const T* grad, int64_t count) {
  using V = typename Lanes<T>::Vector;
  constexpr int kWidth = Lanes<T>::kCount, kParts = kLanes / kWidth;
  V sums[kParts] = {};
  const auto add_lanes = [&](const T* at) {
    for (int part = 0; part < kParts; ++part) {
      const V g = load<V>(at + part * kWidth);
      sums[part] += g * g;
    }
  };
  const int64_t body = count / kLanes * kLanes;
  for (int64_t i = 0; i < body; i += kLanes) add_lanes(grad + i);
  if (body < count) {
    T padded[kLanes] = {};
    __builtin_memcpy(padded, grad + body, (count - body) * sizeof(T));
    add_lanes(padded);
  }
  T lanes[kLanes];
  __builtin_memcpy(lanes, sums, sizeof lanes);
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  // Squares that leave the range of T: once more, in float64.
  if (total - total != 0 || total == 0) {
    total = 0;
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(grad[i]) * grad[i];
  }
  return total;
}

template <class S, class T>
double squares_type(const Tensor& tensor, int64_t begin, int64_t end) {
  constexpr bool kConvert = sizeof(S) != sizeof(T);
  constexpr int64_t kStride = kConvert ? kConvertedTile : kTile;
  T buffer[kConvert ? kStride : 1];
  double total = 0;
  for (int64_t at = begin; at < end; at += kStride) {
    const int64_t count = end - at < kStride ? end - at : kStride;
    total += squares_of(widened(static_cast<const S*>(tensor.grad) + at, count, buffer), count);
  }
  return total;
}

double squares_any(const Tensor& tensor, int64_t begin, int64_t end) {
  switch (static_cast<DType>(tensor.dtype)) {
    case DType::kFloat32:
      return squares_type<float, float>(tensor, begin, end);
    case DType::kFloat64:
      return squares_type<double, double>(tensor, begin, end);
    case DType::kBFloat16:
      return squares_type<BFloat16, float>(tensor, begin, end);
    case DType::kFloat16:
      return squares_type<Float16, float>(tensor, begin, end);
  }
  return 0;
}

}  // namespace AIM_ISA
}  // namespace aim
