// The driver of a step: checks, what a tensor's elements share, chunks over threads, reduction,
// controller.
#include "aim/step.h"

#include <limits>
#include <new>
#include <vector>

#include "aim/isa.h"
#include "common/shared.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace aim {

using namespace baseline;  // common/, compiled for every processor

namespace {

struct Chunk {
  int32_t tensor;
  int32_t shared;  // index into the table of Shared
  int64_t begin, end;
};

// A run of chunks that one thread takes at a time: enough elements that handing out costs nothing.
struct Task {
  int64_t begin, end;
};

bool differ(const double pair[2]) { return pair[kUnder] != pair[kWell]; }

// Groups without optimization state have one class: their rows must not tell two apart.
Status check_rows(const StepTables& tables) {
  if (tables.group_count && !tables.rows) return Status::kNullPointer;
  for (int64_t i = 0; i < tables.tensor_count; ++i) {
    const Tensor& t = tables.tensors[i];
    if ((!t.grad && !t.master) || t.numel == 0 || is_frozen(t) ||
        has_classes(t, variant_of(t, tables.groups[t.group])))
      continue;
    const Row& row = tables.rows[t.group];
    bool split = differ(row.grad) || differ(row.emitted);
    for (const PhaseRow& phase : row.phases)
      split |= differ(phase.grad) || differ(phase.step) || differ(phase.live);
    if (split) return Status::kStatelessRow;
  }
  return Status::kOk;
}

// Splits tensors into chunks and chunks into tasks.
class Work {
 public:
  explicit Work(int64_t tensors) { chunks.reserve(static_cast<size_t>(tensors)); }

  void add(int64_t tensor, int64_t shared, int64_t numel) {
    for (int64_t begin = 0; begin < numel; begin += kChunk) {
      const int64_t end = numel - begin < kChunk ? numel : begin + kChunk;
      chunks.push_back({static_cast<int32_t>(tensor), static_cast<int32_t>(shared), begin, end});
      pending_ += end - begin;
      if (pending_ >= kChunk) close();
    }
  }

  void close() {
    const int64_t begin = tasks.empty() ? 0 : tasks.back().end,
                  end = static_cast<int64_t>(chunks.size());
    if (end > begin) tasks.push_back({begin, end});
    pending_ = 0;
  }

  std::vector<Chunk> chunks;
  std::vector<Task> tasks;

 private:
  int64_t pending_ = 0;
};

// What tensors share, entry by entry. Most tensors of a group are of one age and share one entry.
class SharedTable {
 public:
  // The index of the entry of `tensor`: that of the tensor before it where both have all in common
  // that an entry depends on, else of a new one, which `make(variant, classed)` returns.
  template <class Make>
  int64_t index_for(const Tensor& tensor, const Group& group, const Make& make) {
    const RuleVariant variant = variant_of(tensor, group);
    const Key key{tensor.group,
                  variant,
                  steps_of(tensor),
                  tensor.grad != nullptr,
                  has_classes(tensor, variant),
                  is_frozen(tensor)};
    if (entries_.empty() || !(key == latest_)) {
      entries_.push_back(make(variant, key.classed));
      latest_ = key;
    }
    return static_cast<int64_t>(entries_.size()) - 1;
  }

  const Shared& operator[](int64_t index) const { return entries_[static_cast<size_t>(index)]; }

 private:
  struct Key {
    int32_t group;
    RuleVariant variant;
    double steps;
    bool stepped, classed, frozen;

    bool operator==(const Key& other) const {
      return group == other.group && steps == other.steps && variant == other.variant &&
             stepped == other.stepped && classed == other.classed && frozen == other.frozen;
    }
  };

  std::vector<Shared> entries_;
  Key latest_{};
};

void add(const Statistics& part, Statistics* into) {
  into->numel += part.numel;
  into->under += part.under;
  into->grad_sum += part.grad_sum;
  into->grad_sq += part.grad_sq;
  into->update_sq += part.update_sq;
  into->param_sq += part.param_sq;
  into->nonfinite += part.nonfinite;
}

// Adds chunk sums in the order of the chunks, whichever thread made them: into their tensor first
// and then into its group, so that tensors that are stepped one at a time have the same sums.
void reduce(const StepTables& tables, const Work& work, const std::vector<Partial>& partials,
            Statistics* into) {
  for (size_t i = 0; i < work.chunks.size();) {
    const int32_t number = work.chunks[i].tensor;
    const Tensor& tensor = tables.tensors[number];
    const bool counted = tensor.grad && !tensor.uncounted;
    const bool classed = has_classes(tensor, variant_of(tensor, tables.groups[tensor.group]));
    Statistics sums{};
    for (; i < work.chunks.size() && work.chunks[i].tensor == number; ++i) {
      const Partial& p = partials[i];
      const auto numel = static_cast<double>(work.chunks[i].end - work.chunks[i].begin);
      const double under = classed ? p.under : std::numeric_limits<double>::quiet_NaN();
      add({numel, under, p.grad_sum, p.grad_sq, p.update_sq, p.param_sq, p.nonfinite}, &sums);
    }
    if (counted) add(sums, &into[tensor.group]);
  }
}

bool aligned(const void* address, size_t size) {
  return reinterpret_cast<uintptr_t>(address) % size == 0;
}

// Whether every address is a multiple of its type's size; absent ones are.
bool all_aligned(const Tensor& t) {
  const DType dtype = static_cast<DType>(t.dtype);
  const size_t wide = dtype == DType::kFloat64 ? 8 : 4;
  const size_t stored = dtype == DType::kFloat64 || dtype == DType::kFloat32 ? wide : 2;
  const size_t moment = t.moments == static_cast<int32_t>(Moments::kWide)       ? wide
                        : t.moments == static_cast<int32_t>(Moments::kBFloat16) ? 2
                                                                                : 1;
  return aligned(t.param, stored) && aligned(t.grad, stored) && aligned(t.exp_avg, moment) &&
         aligned(t.exp_avg_sq, moment) && aligned(t.extra, moment) && aligned(t.master, wide) &&
         aligned(t.anchor, wide) && aligned(t.ema, wide) && aligned(t.rest, 2) &&
         aligned(t.step, sizeof(float));
}

// Whether a tensor's ways of saving bytes exist, for its type.
bool packs(const Tensor& t) {
  const DType dtype = static_cast<DType>(t.dtype);
  if (t.moments < 0 || t.moments > static_cast<int32_t>(Moments::kInt8)) return false;
  if (t.moments != 0 && dtype == DType::kFloat64) return false;
  switch (static_cast<Weights>(t.weights)) {
    case Weights::kNearest:
      return true;
    case Weights::kStochastic:
    case Weights::kSplit:
      return dtype == DType::kBFloat16;
    case Weights::kKahan:
      return dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  }
  return false;
}

// Whether there is all that those ways need.
bool has_all_parts(const Tensor& t) {
  const Weights weights = static_cast<Weights>(t.weights);
  if ((weights == Weights::kSplit || weights == Weights::kKahan) && !t.master && !t.rest)
    return false;
  if (static_cast<Moments>(t.moments) != Moments::kInt8) return true;
  return (!t.exp_avg || t.exp_avg_scale) && (!t.exp_avg_sq || t.exp_avg_sq_scale) &&
         (!t.extra || t.extra_scale);
}

}  // namespace

Status check(const StepTables& tables) {
  const Group* const groups = tables.groups;
  const int64_t tensor_count = tables.tensor_count, group_count = tables.group_count;
  if ((tensor_count && !tables.tensors) || (group_count && !groups)) return Status::kNullPointer;
  if (tensor_count < 0 || group_count < 0) return Status::kBadSize;
  if (tensor_count > std::numeric_limits<int32_t>::max()) return Status::kBadSize;
  for (int64_t g = 0; g < group_count; ++g) {
    if (groups[g].rule < 0 || groups[g].rule > static_cast<int32_t>(Rule::kLion))
      return Status::kBadRule;
    if (groups[g].lr_tensor && groups[g].lr_dtype != static_cast<int32_t>(DType::kFloat32) &&
        groups[g].lr_dtype != static_cast<int32_t>(DType::kFloat64)) {
      return Status::kBadDType;
    }
  }
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tables.tensors[i];
    if (t.group < 0 || t.group >= group_count) return Status::kBadGroup;
    if (t.dtype < 0 || t.dtype > static_cast<int32_t>(DType::kFloat16)) return Status::kBadDType;
    if (!packs(t)) return Status::kBadPacking;
    if (t.numel < 0 || t.first < 0 || t.first > std::numeric_limits<int64_t>::max() - t.numel)
      return Status::kBadSize;
    if (t.offset < 0 || t.offset > t.first) return Status::kBadSize;
    if (!t.grad && !t.master) continue;
    const RuleVariant variant = variant_of(t, groups[t.group]);
    const bool frozen = is_frozen(t);
    if (!t.step && !frozen) return Status::kNullPointer;
    if (!all_aligned(t)) return Status::kMisaligned;
    if (t.numel == 0) continue;
    const Group& group = groups[t.group];
    const bool rms = variant == RuleVariant::kRms,
               rmsprop = group.rule == static_cast<int32_t>(Rule::kRmsprop);
    const bool first = rms ? rmsprop && (group.flags & kCentered) : has_first(variant);
    const bool second = variant != RuleVariant::kLion && has_second(variant);
    const bool extra = rms ? rmsprop && group.momentum != 0 : has_extra(variant);
    const bool lacks = (first && !t.exp_avg) || (second && !t.exp_avg_sq) || (extra && !t.extra);
    if (!t.param || (lacks && !frozen) || !has_all_parts(t)) return Status::kNullPointer;
  }
  return Status::kOk;
}

namespace {

// update(), which is not to be done where `any` is given and no tensor has a gradient.
Status update_tensors(const StepTables& tables, const Execution& execution, Statistics* sums,
                      bool* any) {
  Status status = check(tables);
  if (status == Status::kOk) status = check_rows(tables);
  if (status != Status::kOk) return status;
  const Tensor* const tensors = tables.tensors;
  const Row* const rows = tables.rows;
  const Control* const control = tables.control;
  const int64_t tensor_count = tables.tensor_count, group_count = tables.group_count;
  if (!control || (group_count && (!tables.statistics || !sums))) return Status::kNullPointer;
  const char* isa;
  status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;

  const int64_t next = draw_phase(*control);
  std::vector<double> deviations;
  for (int64_t g = 0; g < group_count; ++g)
    deviations.push_back(standard_deviation(tables.statistics[g]));

  SharedTable shared;
  Work work(tensor_count);
  bool stepped_any = false;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if (!t.grad && !t.master) continue;
    stepped_any |= t.grad != nullptr;
    const Group& group = tables.groups[t.group];
    const Row& row = rows[t.group];
    const int64_t index = shared.index_for(t, group, [&](RuleVariant variant, bool classed) {
      if (!t.grad) return emission_of(t, group, variant, classed, row.tau, row.phases[next].live);
      return shared_of({group, row, row.phases[control->phase & 1], row.phases[next], *control,
                        variant, classed, steps_of(t), group.lr, group.scale,
                        deviations[static_cast<size_t>(t.group)]});
    });
    work.add(i, index, t.numel);
  }
  work.close();
  if (any) *any = stepped_any;
  if (any && !stepped_any) return Status::kOk;

  // The last allocations: from here on nothing can fail.
  std::vector<Partial> partials(work.chunks.size());
  for (int64_t g = 0; g < group_count; ++g) sums[g] = Statistics{};
  const KernelTable& kernels = kernels_of(isa);
  for_each_task(execution, static_cast<int64_t>(work.tasks.size()), [&](int64_t task) {
    const Task& range = work.tasks[static_cast<size_t>(task)];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& chunk = work.chunks[static_cast<size_t>(i)];
      const Tensor& tensor = tensors[chunk.tensor];
      const Shared& s = shared[chunk.shared];
      if (adopts(tensor, rows[tensor.group])) kernels.adopt(tensor, chunk.begin, chunk.end);
      if (tensor.grad) {
        kernels.update(tensor, s, chunk.begin, chunk.end, &partials[static_cast<size_t>(i)]);
      } else {
        kernels.emit(tensor, s, chunk.begin, chunk.end);
      }
    }
  });

  reduce(tables, work, partials, sums);
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    const Row& row = rows[t.group];
    if (t.grad && !is_held(row, row.phases[control->phase & 1])) *t.step += 1;
  }
  return Status::kOk;
}

}  // namespace

Status update(const StepTables& tables, const Execution& execution, Statistics* sums) {
  return update_tensors(tables, execution, sums, nullptr);
}

Status finish(const StepTables& tables, const Statistics* sums) {
  Row* const rows = tables.rows;
  Control* const control = tables.control;
  if (!control) return Status::kNullPointer;
  if (tables.group_count < 0) return Status::kBadSize;
  if (tables.group_count && (!tables.groups || !sums || !rows || !tables.statistics)) {
    return Status::kNullPointer;
  }
  const int64_t next = draw_phase(*control);
  for (int64_t g = 0; g < tables.group_count; ++g) {
    finish_row(tables.groups[g], sums[g], is_held(rows[g], rows[g].phases[control->phase & 1]),
               next, &rows[g]);
    if (sums[g].numel > 0) tables.statistics[g] = sums[g];
  }
  control->phase = next;
  control->counter += 1;
  return Status::kOk;
}

Status step(const StepTables& tables, const Execution& execution) {
  std::vector<Statistics> sums(
      static_cast<size_t>(tables.group_count > 0 ? tables.group_count : 0));
  bool any = false;
  const Status status = update_tensors(tables, execution, sums.data(), &any);
  if (status != Status::kOk || !any) return status;
  return finish(tables, sums.data());
}

Status emit(const StepTables& tables, const Execution& execution) {
  Status status = check(tables);
  if (status == Status::kOk) status = check_rows(tables);
  if (status != Status::kOk) return status;
  const char* isa;
  status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;

  SharedTable shared;
  Work work(tables.tensor_count);
  for (int64_t i = 0; i < tables.tensor_count; ++i) {
    const Tensor& t = tables.tensors[i];
    if (!t.master) continue;
    const Group& group = tables.groups[t.group];
    const Row& row = tables.rows[t.group];
    const int64_t index = shared.index_for(t, group, [&](RuleVariant variant, bool classed) {
      return emission_of(t, group, variant, classed, row.tau_prev, row.emitted);
    });
    work.add(i, index, t.numel);
  }
  work.close();
  const KernelTable& kernels = kernels_of(isa);
  for_each_task(execution, static_cast<int64_t>(work.tasks.size()), [&](int64_t task) {
    const Task& range = work.tasks[static_cast<size_t>(task)];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& chunk = work.chunks[static_cast<size_t>(i)];
      kernels.emit(tables.tensors[chunk.tensor], shared[chunk.shared], chunk.begin, chunk.end);
    }
  });
  return Status::kOk;
}

void philox(uint64_t seed, const uint32_t counter[4], uint32_t output[4]) {
  const auto r = philox4x32(seed, {{counter[0], counter[1], counter[2], counter[3]}});
  for (int i = 0; i < 4; ++i) output[i] = r.x[i];
}

const char* describe(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kNullPointer:
      return "a pointer that the rule or the state needs is absent";
    case Status::kBadSize:
      return "a count is negative or too large";
    case Status::kMisaligned:
      return "an address is no multiple of its type's size";
    case Status::kBadGroup:
      return "a tensor names a group that does not exist";
    case Status::kBadDType:
      return "unknown dtype";
    case Status::kBadRule:
      return "unknown rule";
    case Status::kBadPacking:
      return "unknown storage of moments or weights, or none that this dtype has";
    case Status::kStatelessRow:
      return "under and well columns differ in a group that keeps no optimization state "
             "(modulated=False)";
    case Status::kUnknownIsa:
      return "unknown instruction set; the names are scalar, avx2, avx512, neon";
    case Status::kUnsupportedIsa:
      return "this build or this processor lacks the instruction set";
  }
  return "unknown status";
}

}  // namespace aim
