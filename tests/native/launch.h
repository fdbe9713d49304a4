// A problem as tables for a device: shared by the tests of the CUDA kernels.
#pragma once

#include <string>
#include <vector>

#include "aim/cuda.h"
#include "problem.h"

inline aim::cuda::Family family_of(const Case& c) {
  if (c.keep.any()) return aim::cuda::kPackedFamily;
  const bool adam = c.rule == aim::Rule::kAdamW || c.rule == aim::Rule::kAdam;
  if (adam && !(c.flags & aim::kAmsgrad)) return aim::cuda::kAdamFamily;
  return c.rule == aim::Rule::kSgd ? aim::cuda::kSgdFamily : aim::cuda::kOtherFamily;
}

struct Launch {
  Launch(Problem& p, int32_t chunk_size, int32_t threads) : problem(p) {
    for (int64_t begin = 0; begin < p.shape.numel; begin += chunk_size)
      chunks.push_back({0, static_cast<int32_t>(chunks.size())});
    partials.resize(chunks.size());
    span = {0, 1, 0, static_cast<int64_t>(chunks.size())};
    work.tensors = &p.tensor;
    work.groups = &p.group;
    work.rows = &p.row;
    work.statistics = &p.statistics;
    work.control = &p.control;
    work.chunks = chunks.data();
    work.spans = &span;
    work.partials = partials.data();
    work.phases = phases;
    work.chunk_count = static_cast<int64_t>(chunks.size());
    work.group_count = 1;
    work.chunk_size = chunk_size;
    work.threads = threads;
    work.dtypes = 1 << static_cast<int32_t>(p.shape.dtype);
    work.families = 1 << family_of(p.shape);
  }

  void step(const std::string& what) {
    expect(aim::cuda::update(work, 0, nullptr).error == 0, "update, " + what);
    expect(aim::cuda::finish(work, 0, nullptr).error == 0, "finish, " + what);
  }

  Problem& problem;
  std::vector<aim::cuda::Chunk> chunks;
  std::vector<aim::Statistics> partials;
  aim::cuda::Span span;
  int64_t phases[2] = {-1, -1};
  aim::cuda::Work work{};
};
