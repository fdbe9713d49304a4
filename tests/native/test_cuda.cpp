// The CUDA kernels with the processor as their device, for sanitizers: bit for bit what the CPU
// kernels compute, inside their buffers, and the same again whatever the order of the blocks. Under
// ThreadSanitizer a barrier that is missing is a race.
#include <cstdio>
#include <cstring>
#include <string>

#include "launch.h"

// cuda_groups.cpp: several groups in one launch.
void groups_agree();
// cuda_packed.cpp: what keeps numbers in fewer bits. Returns the number of cases.
int packed_agree();

namespace {

void agrees_with_the_processor(const Case& c, bool aligned, bool mixed) {
  const std::string what = name_of(c) + (aligned ? ", aligned" : ", misaligned");
  Problem expected(c, 1, aligned), p(c, 1, aligned);
  Launch launch(p, 256, 32);
  if (mixed) launch.work.families = aim::cuda::kAllFamilies, launch.work.dtypes = 15;
  for (int step = 0; step < 3; ++step) {
    expect(expected.run("scalar", 1) == aim::Status::kOk, "scalar, " + what);
    launch.step(what);
    same_statistics(expected.statistics, p.statistics, what);
    p.statistics = expected.statistics;  // noise is measured by them
    expect(p.equals(expected), "bits, " + what);
  }
  expect(p.guards_intact(), "guards, " + what);
  if (!c.live) return;
  std::memset(p.param.data(), 0, p.count() * size_of(c.dtype));
  expect(aim::cuda::emit(launch.work, 0, nullptr).error == 0, "emit, " + what);
  expect(p.equals(expected), "emission, " + what);
  // A parameter without a gradient, but with live weights.
  expected.tensor.grad = p.tensor.grad = nullptr;
  expected.control.phase = p.control.phase = 1;
  launch.step(what);
  expect(p.statistics.numel == expected.statistics.numel && p.control.counter == 11 &&
             p.step == expected.step,
         "no gradient, " + what);
  expect(p.guards_intact(), "guards without a gradient, " + what);
}

void skips_and_scales() {
  const Case c{aim::Rule::kAdamW, aim::DType::kFloat32, 700, true, false, false, false, true};
  Problem before(c, 4, true), p(c, 4, true);
  Launch launch(p, 256, 64);
  float found = 1, scale = 4;
  launch.work.found_inf = &found;
  launch.work.grad_scale = &scale;
  launch.step("skipped");
  expect(p.equals(before), "a skipped step changes nothing");
  found = 0;
  launch.step("scaled");
  before.group.scale = 0.25;
  expect(before.run("scalar", 1) == aim::Status::kOk, "scaled");
  p.statistics = before.statistics;
  expect(p.equals(before), "a scaled step");
}

void reads_learning_rates() {
  const Case c{aim::Rule::kAdam, aim::DType::kFloat32, 700, false, false, false, false, true};
  float single = 0.03f;
  double wide = 0.03;
  for (bool is_wide : {false, true}) {
    Problem expected(c, 5, true), p(c, 5, true);
    expected.group.lr = is_wide ? wide : static_cast<double>(single);
    p.group.lr = -1;
    p.group.lr_tensor = is_wide ? static_cast<void*>(&wide) : &single;
    p.group.lr_dtype = static_cast<int32_t>(is_wide ? aim::DType::kFloat64 : aim::DType::kFloat32);
    Launch launch(p, 256, 64);
    launch.step("learning rate");
    expect(expected.run("scalar", 1) == aim::Status::kOk, "learning rate");
    p.statistics = expected.statistics;
    expect(p.equals(expected), "learning rate in memory");
  }
}

void bad_calls_are_refused() {
  const Case c{aim::Rule::kAdam, aim::DType::kFloat32, 70, false, false, false, false, true};
  Problem before(c, 6, true), p(c, 6, true);
  for (int32_t threads : {0, 31, 48, aim::cuda::kMostThreads + 32}) {
    Launch launch(p, 256, threads);
    expect(aim::cuda::update(launch.work, 0, nullptr).error == 1, "threads");
    expect(aim::cuda::finish(launch.work, 0, nullptr).error == 1, "threads");
  }
  Launch launch(p, 256, 64);
  const aim::cuda::Result result = aim::cuda::update(launch.work, 3, nullptr);
  expect(result.error == 101 && !std::strcmp(aim::cuda::describe(result), "invalid device ordinal"),
         "device");
  expect(p.equals(before), "refusals change nothing");
}

void copies() {
  for (size_t bytes : {0, 1, 15, 16, 100, 40000}) {
    Buffer from(bytes, 1, true), to(bytes, 1, true);
    for (size_t i = 0; i < bytes; ++i) from.data()[i] = static_cast<unsigned char>(i * 7 + 1);
    expect(aim::cuda::copy_bytes(from.data(), to.data(), static_cast<int64_t>(bytes), 0, nullptr)
                   .error == 0,
           "copy");
    expect(from == to, "copied");
  }
}

}  // namespace

int main() {
  using aim::DType;
  int cases = 0;
#ifdef AIM_SMALL_TEST
  const int64_t sizes[] = {300};
#else
  const int64_t sizes[] = {1, 63, 256, 777};
#endif
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (bool live : {false, true}) {
      for (bool noisy : {false, true}) {
        for (int64_t numel : sizes) {
          for (const Case& c : variants(dtype, numel, live, noisy)) {
            agrees_with_the_processor(c, cases % 3 != 0, cases % 5 == 0);
            ++cases;
          }
        }
      }
    }
  }
  skips_and_scales();
  reads_learning_rates();
  bad_calls_are_refused();
  copies();
  groups_agree();
  cases += packed_agree();
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
