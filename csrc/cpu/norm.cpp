// The sum of squares of all gradients: for clipping by their norm, in one read.
#include <vector>

#include "aim/isa.h"
#include "aim/step.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace aim {

Status squares(const StepTables& tables, const Execution& execution, double* sum) {
  if (tables.tensor_count < 0) return Status::kBadSize;
  if ((tables.tensor_count && !tables.tensors) || !sum) return Status::kNullPointer;
  for (int64_t i = 0; i < tables.tensor_count; ++i) {
    const Tensor& t = tables.tensors[i];
    if (t.dtype < 0 || t.dtype > static_cast<int32_t>(DType::kFloat16)) return Status::kBadDType;
    if (t.numel < 0) return Status::kBadSize;
  }
  const char* isa;
  const Status status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;

  struct Chunk {
    const Tensor* tensor;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  std::vector<size_t> tasks(1, 0);  // where each begins: chunks of about kChunk elements together
  int64_t pending = 0;
  for (int64_t i = 0; i < tables.tensor_count; ++i) {
    const Tensor& t = tables.tensors[i];
    if (!t.grad || t.uncounted) continue;
    for (int64_t begin = 0; begin < t.numel; begin += kChunk) {
      const int64_t end = t.numel - begin < kChunk ? t.numel : begin + kChunk;
      chunks.push_back({&t, begin, end});
      pending += end - begin;
      if (pending < kChunk) continue;
      tasks.push_back(chunks.size());
      pending = 0;
    }
  }
  if (tasks.back() != chunks.size()) tasks.push_back(chunks.size());
  std::vector<double> sums(chunks.size());
  const auto run = kernels_of(isa).squares;
  for_each_task(execution, static_cast<int64_t>(tasks.size()) - 1, [&](int64_t task) {
    for (size_t i = tasks[static_cast<size_t>(task)]; i < tasks[static_cast<size_t>(task) + 1]; ++i)
      sums[i] = run(*chunks[i].tensor, chunks[i].begin, chunks[i].end);
  });
  *sum = 0;
  for (double x : sums) *sum += x;  // in the order of the chunks, whichever thread made them
  return Status::kOk;
}

}  // namespace aim
