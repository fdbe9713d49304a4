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
Status check_rows(const Tensor* tensors, int64_t tensor_count, const Group* groups, const Row* rows,
                  int64_t group_count) {
  if (group_count && !rows) return Status::kNullPointer;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if ((!t.grad && !t.master) || t.numel == 0 || is_frozen(t) ||
        has_classes(t, kind_of(t, groups[t.group])))
      continue;
    const Row& row = rows[t.group];
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
void reduce(const Tensor* tensors, const Group* groups, const Work& work,
            const std::vector<Partial>& partials, Statistics* into) {
  for (size_t i = 0; i < work.chunks.size();) {
    const int32_t number = work.chunks[i].tensor;
    const Tensor& tensor = tensors[number];
    const bool counted = tensor.grad && !tensor.uncounted;
    const bool classed = has_classes(tensor, kind_of(tensor, groups[tensor.group]));
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

Status check(const Tensor* tensors, int64_t tensor_count, const Group* groups,
             int64_t group_count) {
  if ((tensor_count && !tensors) || (group_count && !groups)) return Status::kNullPointer;
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
    const Tensor& t = tensors[i];
    if (t.group < 0 || t.group >= group_count) return Status::kBadGroup;
    if (t.dtype < 0 || t.dtype > static_cast<int32_t>(DType::kFloat16)) return Status::kBadDType;
    if (!packs(t)) return Status::kBadPacking;
    if (t.numel < 0 || t.first < 0 || t.first > std::numeric_limits<int64_t>::max() - t.numel)
      return Status::kBadSize;
    if (t.offset < 0 || t.offset > t.first) return Status::kBadSize;
    if (!t.grad && !t.master) continue;
    const Kind kind = kind_of(t, groups[t.group]);
    const bool frozen = is_frozen(t);
    if (!t.step && !frozen) return Status::kNullPointer;
    if (!all_aligned(t)) return Status::kMisaligned;
    if (t.numel == 0) continue;
    const Group& group = groups[t.group];
    const bool rms = kind == Kind::kRms,
               rmsprop = group.rule == static_cast<int32_t>(Rule::kRmsprop);
    const bool first = rms ? rmsprop && (group.flags & kCentered) : has_first(kind);
    const bool second = kind != Kind::kLion && has_second(kind);
    const bool extra = rms ? rmsprop && group.momentum != 0 : has_extra(kind);
    const bool lacks = (first && !t.exp_avg) || (second && !t.exp_avg_sq) || (extra && !t.extra);
    if (!t.param || (lacks && !frozen) || !has_all_parts(t)) return Status::kNullPointer;
  }
  return Status::kOk;
}

namespace {

// update(), which is not to be done where `any` is given and no tensor has a gradient.
Status move(const Tensor* tensors, int64_t tensor_count, const Group* groups, const Row* rows,
            const Statistics* statistics, int64_t group_count, const Control* control,
            const Execution& execution, Statistics* sums, bool* any) {
  Status status = check(tensors, tensor_count, groups, group_count);
  if (status == Status::kOk) status = check_rows(tensors, tensor_count, groups, rows, group_count);
  if (status != Status::kOk) return status;
  if (!control || (group_count && (!statistics || !sums))) return Status::kNullPointer;
  const char* isa;
  status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;

  const int64_t next = draw_phase(*control);
  std::vector<double> deviations;
  for (int64_t g = 0; g < group_count; ++g) deviations.push_back(standard_deviation(statistics[g]));

  std::vector<Shared> shared;
  Work work(tensor_count);
  int32_t last_group = -1;
  double last_steps = -1;
  bool last_stepped = false, last_classed = false, last_frozen = false;
  Kind last_kind = Kind::kAdam;
  bool stepped_any = false;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if (!t.grad && !t.master) continue;
    stepped_any |= t.grad != nullptr;
    const Group& group = groups[t.group];
    const Row& row = rows[t.group];
    const Kind kind = kind_of(t, group);
    const double steps = steps_of(t);
    const bool stepped = t.grad != nullptr, classed = has_classes(t, kind), frozen = is_frozen(t);
    // Most tensors of a group are of one age: they share.
    if (t.group != last_group || steps != last_steps || kind != last_kind ||
        stepped != last_stepped || classed != last_classed || frozen != last_frozen) {
      shared.push_back(stepped
                           ? shared_of(group, row, row.phases[control->phase & 1], row.phases[next],
                                       kind, classed, steps, group.scale, group.lr,
                                       deviations[static_cast<size_t>(t.group)], *control)
                           : emission_of(t, group, kind, classed, row.tau, row.phases[next].live));
      last_group = t.group;
      last_steps = steps;
      last_kind = kind;
      last_stepped = stepped;
      last_classed = classed;
      last_frozen = frozen;
    }
    work.add(i, static_cast<int64_t>(shared.size()) - 1, t.numel);
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
      const Shared& s = shared[static_cast<size_t>(chunk.shared)];
      if (adopts(tensor, rows[tensor.group])) kernels.adopt(tensor, chunk.begin, chunk.end);
      if (tensor.grad) {
        kernels.update(tensor, s, chunk.begin, chunk.end, &partials[static_cast<size_t>(i)]);
      } else {
        kernels.emit(tensor, s, chunk.begin, chunk.end);
      }
    }
  });

  reduce(tensors, groups, work, partials, sums);
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    const Row& row = rows[t.group];
    if (t.grad && !is_held(row, row.phases[control->phase & 1])) *t.step += 1;
  }
  return Status::kOk;
}

}  // namespace

Status update(const Tensor* tensors, int64_t tensor_count, const Group* groups, const Row* rows,
              const Statistics* statistics, int64_t group_count, const Control* control,
              const Execution& execution, Statistics* sums) {
  return move(tensors, tensor_count, groups, rows, statistics, group_count, control, execution,
              sums, nullptr);
}

Status finish(const Group* groups, const Statistics* sums, Row* rows, Statistics* statistics,
              int64_t group_count, Control* control) {
  if (!control || group_count < 0) return control ? Status::kBadSize : Status::kNullPointer;
  if (group_count && (!groups || !sums || !rows || !statistics)) return Status::kNullPointer;
  const int64_t next = draw_phase(*control);
  for (int64_t g = 0; g < group_count; ++g) {
    finish_row(groups[g], sums[g], is_held(rows[g], rows[g].phases[control->phase & 1]), next,
               &rows[g]);
    if (sums[g].numel > 0) statistics[g] = sums[g];
  }
  control->phase = next;
  control->counter += 1;
  return Status::kOk;
}

Status step(const Tensor* tensors, int64_t tensor_count, const Group* groups, Row* rows,
            Statistics* statistics, int64_t group_count, Control* control,
            const Execution& execution) {
  std::vector<Statistics> sums(static_cast<size_t>(group_count > 0 ? group_count : 0));
  bool any = false;
  const Status status = move(tensors, tensor_count, groups, rows, statistics, group_count, control,
                             execution, sums.data(), &any);
  if (status != Status::kOk || !any) return status;
  return finish(groups, sums.data(), rows, statistics, group_count, control);
}

Status emit(const Tensor* tensors, int64_t tensor_count, const Group* groups, const Row* rows,
            int64_t group_count, const Execution& execution) {
  Status status = check(tensors, tensor_count, groups, group_count);
  if (status == Status::kOk) status = check_rows(tensors, tensor_count, groups, rows, group_count);
  if (status != Status::kOk) return status;
  const char* isa;
  status = choose_isa(execution.isa, &isa);
  if (status != Status::kOk) return status;

  std::vector<Shared> shared;
  Work work(tensor_count);
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if (!t.master) continue;
    const Group& group = groups[t.group];
    const Row& row = rows[t.group];
    const Kind kind = kind_of(t, group);
    shared.push_back(emission_of(t, group, kind, has_classes(t, kind), row.tau_prev, row.emitted));
    work.add(i, static_cast<int64_t>(shared.size()) - 1, t.numel);
  }
  work.close();
  const KernelTable& kernels = kernels_of(isa);
  for_each_task(execution, static_cast<int64_t>(work.tasks.size()), [&](int64_t task) {
    const Task& range = work.tasks[static_cast<size_t>(task)];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& chunk = work.chunks[static_cast<size_t>(i)];
      kernels.emit(tensors[chunk.tensor], shared[static_cast<size_t>(chunk.shared)], chunk.begin,
                   chunk.end);
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
