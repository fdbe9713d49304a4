// Tensors that keep numbers in fewer bits, an average, or no gradient: the CUDA kernels store the
// bits that the CPU kernels store.
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "launch.h"

namespace {

using aim::DType;
using aim::Moments;
using aim::Weights;

void agrees(const Case& c, bool aligned, int32_t threads) {
  const std::string what = name_of(c) + (aligned ? ", aligned" : ", misaligned");
  Problem expected(c, 1, aligned), p(c, 1, aligned);
  Launch launch(p, 256, threads);
  const size_t bytes = p.count() * size_of(c.dtype);
  const std::vector<unsigned char> grad(p.grad.data(), p.grad.data() + bytes);
  for (int step = 0; step < 2; ++step) {
    for (Problem* each : {&p, &expected}) std::memcpy(each->grad.data(), grad.data(), bytes);
    expect(expected.run("scalar", 1) == aim::Status::kOk, "scalar, " + what);
    launch.step(what);
    same_statistics(expected.statistics, p.statistics, what);
    p.statistics = expected.statistics;  // noise is measured by them
    expect(p.equals(expected), "bits, " + what);
  }
  bool cleared = true;
  for (size_t i = 0; i < bytes; ++i) cleared &= p.grad.data()[i] == 0;
  expect(cleared == c.keep.zero_grad, "gradient, " + what);
  expect(p.guards_intact() && expected.guards_intact(), "guards, " + what);
  if (!c.live) return;
  std::memset(p.param.data(), 0, bytes);
  expect(aim::cuda::emit(launch.work, 0, nullptr).error == 0, "emit, " + what);
  expect(p.equals(expected), "emission, " + what);
}

// Every way of keeping with every rule; what else there is takes turns.
int combinations() {
  int cases = 0;
#ifdef AIM_SMALL_TEST
  const int64_t sizes[] = {129, 700};
  constexpr int kSizes = 2, kEvery = 11;
#else
  const int64_t sizes[] = {129, 1, 127, 700, 128};
  constexpr int kSizes = 5, kEvery = 1;
#endif
  const int64_t offsets[] = {0, 256, 1001};
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (Moments moments : {Moments::kWide, Moments::kBFloat16, Moments::kInt8}) {
      for (Weights weights :
           {Weights::kNearest, Weights::kStochastic, Weights::kSplit, Weights::kKahan}) {
        Keep keep{moments, weights};
        if (keep.of(dtype).moments != moments || keep.of(dtype).weights != weights) continue;
        for (size_t rule = 0; rule < 15; ++rule) {
          const int number = cases++;
          if (number % kEvery != 0) continue;
          const bool live = number % 2 != 0, noisy = number / 2 % 4 == 0;
          Case c = variants(dtype, sizes[number % kSizes], live, noisy)[rule];
          keep.stochastic = number / 3 % 2 != 0;
          keep.zero_grad = number % 7 < 3;
          keep.ema = number % 5 < 2 || !(keep.any());
          keep.offset = offsets[number / 2 % 3];
          c.keep = keep;
          agrees(c, number % 4 != 3, number % 3 ? 32 : 96);
        }
      }
    }
  }
  return cases / kEvery;
}

// Several chunks, and rows that the threads of a block share unevenly.
int large() {
  int cases = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    for (bool live : {false, true}) {
      Case c{aim::Rule::kAdamW, dtype, 5000, live, live, false, false, true};
      c.keep = Keep{Moments::kInt8, Weights::kStochastic, true, true, true, 3}.of(dtype);
      agrees(c, true, 64);
      ++cases;
    }
  }
  return cases;
}

// What is not finite is counted before the gradient is cleared, and spoils its block alone.
int not_finite() {
  int cases = 0;
  for (Moments moments : {Moments::kWide, Moments::kBFloat16, Moments::kInt8}) {
    Case c{aim::Rule::kAdamW, DType::kFloat32, 500, false, false, false, false, true};
    c.keep = {moments, Weights::kNearest, true, true, true};
    const std::string what = name_of(c) + ", not finite";
    Problem expected(c, 2, true), p(c, 2, true);
    for (Problem* each : {&p, &expected}) {
      each->grad.as<float>()[7] = 3e38f;
      each->grad.as<float>()[140] = std::numeric_limits<float>::infinity();
      each->grad.as<float>()[499] = std::numeric_limits<float>::quiet_NaN();
    }
    Launch launch(p, 256, 32);
    expect(expected.run("scalar", 1) == aim::Status::kOk, what);
    launch.step(what);
    expect(p.same_moments(expected) && p.grad == expected.grad, "bits, " + what);
    expect(p.guards_intact() && expected.guards_intact(), "guards, " + what);
    expect(p.statistics.nonfinite == 2 && p.statistics.numel == 500, "counts, " + what);
    // The third block is all finite; so are the others where no block has an exponent.
    for (size_t i = 0; i < 500; ++i) {
      const bool spoiled = moments == Moments::kInt8 ? i < 256 || i >= 384 : i == 140 || i == 499;
      const float theta = p.param.as<float>()[i];
      if (!spoiled) expect(theta == expected.param.as<float>()[i], "weights, " + what);
    }
    ++cases;
  }
  return cases;
}

// Nothing is written but zeros.
int skipped() {
  int cases = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (bool zero_grad : {false, true}) {
      Case c{aim::Rule::kAdamW, dtype, 700, true, false, false, false, true};
      c.keep = Keep{Moments::kInt8, Weights::kNearest, true, true, zero_grad}.of(dtype);
      const std::string what = name_of(c) + ", skipped";
      Problem before(c, 4, cases % 2 == 0), p(c, 4, cases % 2 == 0);
      Launch launch(p, 256, 64);
      float found = 1;
      launch.work.found_inf = &found;
      launch.step(what);
      if (zero_grad) std::memset(before.grad.data(), 0, before.count() * size_of(dtype));
      expect(p.equals(before) && p.guards_intact(), what);
      ++cases;
    }
  }
  return cases;
}

int refused() {
  Case c{aim::Rule::kAdamW, DType::kFloat32, 700, false, false, false, false, true};
  c.keep.moments = Moments::kInt8;
  Problem p(c, 6, true);
  Launch launch(p, 192, 64);
  expect(aim::cuda::update(launch.work, 0, nullptr).error == 1, "chunks that cut blocks");
  return 1;
}

}  // namespace

int packed_agree() { return combinations() + large() + not_finite() + skipped() + refused(); }
