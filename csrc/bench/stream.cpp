#include "bench/stream.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "aim/isa.h"
#include "bench/stream_table.h"
#include "cpu/parallel.h"

namespace aim {
namespace bench {
namespace {

// The loops of an instruction set that choose_isa() has accepted.
const StreamTable& streams_of([[maybe_unused]] const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx2")) return avx2::kStreams;
  if (!std::strcmp(isa, "avx512")) return avx512::kStreams;
#elif defined(__aarch64__)
  if (!std::strcmp(isa, "neon")) return neon::kStreams;
#endif
  return scalar::kStreams;
}

Status check(const Tensor* tensors, int64_t tensor_count, const StreamPlan& plan) {
  if (tensor_count < 0 || plan.chunk < 0) return Status::kBadSize;
  if (tensor_count && !tensors) return Status::kNullPointer;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if (static_cast<DType>(t.dtype) != DType::kFloat32) return Status::kBadDType;
    if (t.numel < 0) return Status::kBadSize;
    if (!t.param || !t.grad || !t.exp_avg || !t.exp_avg_sq || (plan.live && !t.master)) {
      return Status::kNullPointer;
    }
  }
  return Status::kOk;
}

}  // namespace

Status stream(const Tensor* tensors, int64_t tensor_count, const StreamPlan& plan, float factor,
              const Execution& execution) {
  Status status = check(tensors, tensor_count, plan);
  if (status != Status::kOk) return status;
  const char* isa;
  status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;
  const auto run = streams_of(isa).arrays;

  // Tensors lie end to end on one line of elements, which tasks cut at equal lengths.
  std::vector<int64_t> starts(1, 0);
  for (int64_t i = 0; i < tensor_count; ++i) starts.push_back(starts.back() + tensors[i].numel);
  const int64_t total = starts.back(), threads = std::max(execution.threads, 1);
  const int64_t share = (total + threads - 1) / threads;
  // Cuts fall on cache lines, so that no two threads write the same one.
  const int64_t length = std::max<int64_t>(((plan.chunk ? plan.chunk : share) + 15) / 16 * 16, 16);
  for_each_task(execution, (total + length - 1) / length, [&](int64_t task) {
    const int64_t begin = task * length, end = std::min(begin + length, total);
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t at = begin; at < end; at = starts[++i]) {
      const Tensor& t = tensors[i];
      const StreamArrays a{static_cast<const float*>(t.grad), static_cast<float*>(t.param),
                           static_cast<float*>(t.exp_avg), static_cast<float*>(t.exp_avg_sq),
                           static_cast<float*>(t.master)};
      run(a, plan.live, plan.nontemporal, factor, at - starts[i],
          std::min(end, starts[i + 1]) - starts[i]);
    }
  });
  return Status::kOk;
}

Status stream_runs(const StreamRun* runs, int64_t run_count, int64_t numel, int64_t chunk,
                   int32_t add, const Execution& execution) {
  if (run_count < 0 || numel < 0 || chunk < 0) return Status::kBadSize;
  if (run_count && !runs) return Status::kNullPointer;
  for (int64_t i = 0; i < run_count; ++i) {
    const int64_t size = runs[i].size;
    if (size != 1 && size != 2 && size != 4 && size != 8) return Status::kBadSize;
    if (!runs[i].address) return Status::kNullPointer;
  }
  const char* isa;
  const Status status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;
  const auto run = streams_of(isa).run;
  const int64_t threads = std::max(execution.threads, 1), share = (numel + threads - 1) / threads;
  // Side by side: a block of every run after the other, short enough to stay in the first-level
  // cache.
  constexpr int64_t kBlock = 512;
  if (numel == 0) return Status::kOk;
  const int64_t wanted = chunk ? std::min(chunk, numel) : share;
  const int64_t length = (wanted - 1) / kBlock * kBlock + kBlock;
  for_each_task(execution, (numel + length - 1) / length, [&](int64_t task) {
    const int64_t last = std::min((task + 1) * length, numel);
    int32_t seen = 0;
    for (int64_t begin = task * length; begin < last; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, last);
      for (int64_t i = 0; i < run_count; ++i) {
        const StreamRun& r = runs[i];
        seen ^= run(static_cast<char*>(r.address), r.reads != 0, r.writes != 0, add, begin * r.size,
                    end * r.size);
      }
    }
    asm volatile("" ::"r"(seen));  // or nothing would have to be read
  });
  return Status::kOk;
}

}  // namespace bench
}  // namespace aim
