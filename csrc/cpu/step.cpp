// The driver of a step: checks, what a tensor's elements share, chunks over threads, reduction,
// controller.
#include "aim/step.h"

#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "aim/isa.h"
#include "common/element.h"
#include "common/philox.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace aim {
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

Kind kind_of(const Tensor& tensor, const Group& group) {
  if (static_cast<Rule>(group.rule) != Rule::kSgd) return Kind::kAdam;
  if (tensor.exp_avg_sq) return group.momentum != 0 ? Kind::kSgdMomentumState : Kind::kSgdState;
  return group.momentum != 0 ? Kind::kSgdMomentum : Kind::kSgd;
}

bool differ(const double pair[2]) { return pair[kUnder] != pair[kWell]; }

Status check(const Tensor* tensors, int64_t tensor_count, const Group* groups, const Row* rows,
             int64_t group_count) {
  if ((tensor_count && !tensors) || (group_count && (!groups || !rows)))
    return Status::kNullPointer;
  if (tensor_count < 0 || group_count < 0) return Status::kBadSize;
  if (tensor_count > std::numeric_limits<int32_t>::max()) return Status::kBadSize;
  for (int64_t g = 0; g < group_count; ++g) {
    if (groups[g].rule < 0 || groups[g].rule > static_cast<int32_t>(Rule::kSgd))
      return Status::kBadRule;
  }
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if (t.group < 0 || t.group >= group_count) return Status::kBadGroup;
    if (t.dtype < 0 || t.dtype > static_cast<int32_t>(DType::kFloat16)) return Status::kBadDType;
    if (t.numel < 0 || t.first < 0 || t.first > std::numeric_limits<int64_t>::max() - t.numel)
      return Status::kBadSize;
    if (!t.grad && !t.master) continue;
    const Kind kind = kind_of(t, groups[t.group]);
    if (!t.step) return Status::kNullPointer;
    if (t.numel == 0) continue;
    if (!t.param || (baseline::has_first(kind) && !t.exp_avg) ||
        (baseline::has_second(kind) && !t.exp_avg_sq)) {
      return Status::kNullPointer;
    }
    if (!baseline::has_second(kind)) {
      const Row& row = rows[t.group];
      bool split = differ(row.grad) || differ(row.emitted);
      for (const PhaseRow& phase : row.phases)
        split |= differ(phase.grad) || differ(phase.step) || differ(phase.live);
      if (split) return Status::kStatelessRow;
    }
  }
  return Status::kOk;
}

// Factor that turns the stored first moment into an average, after `t` steps.
double first_weight(const Group& group, Kind kind, double t) {
  if (kind != Kind::kSgdMomentum && kind != Kind::kSgdMomentumState)
    return 1 - std::pow(group.beta1, t);
  const double mu = group.momentum;
  const double earlier = mu == 1 ? t - 1 : (1 - std::pow(mu, t - 1)) / (1 - mu);
  return std::pow(mu, t - 1) + (1 - group.dampening) * earlier;
}

// under: m^2 >= slope * v + offset, for thresholds on moments that are `t` steps old. At t = 0
// everything is under-optimized.
void threshold(const Group& group, Kind kind, double t, double tau, double* slope, double* offset) {
  if (t < 1) {
    *slope = *offset = 0;
    return;
  }
  const double weight = first_weight(group, kind, t);
  const double squared = tau * tau * weight * weight;
  *slope = squared / (1 - std::pow(group.beta2, t));
  *offset = squared * group.eps * group.eps;
}

void copy(const double from[2], double to[2]) {
  to[0] = from[0];
  to[1] = from[1];
}

Shared shared_of(const Group& group, const Row& row, const PhaseRow& now, const PhaseRow& next,
                 Kind kind, double steps_taken, double deviation, const Control& control) {
  Shared shared{};
  Uniforms<double>& u = shared.u;
  const double t = steps_taken + 1;
  const bool adam = kind == Kind::kAdam, decoupled = static_cast<Rule>(group.rule) == Rule::kAdamW;
  u.scale = group.scale;
  u.coupled_decay = decoupled ? 0 : group.weight_decay;
  u.decay = decoupled ? 1 - group.lr * group.weight_decay : 1;
  copy(row.grad, u.grad);
  copy(next.live, u.live);
  u.sigma = row.noise * deviation;
  if (kind == Kind::kSgdMomentum || kind == Kind::kSgdMomentumState) {
    u.first_keep = t > 1 ? group.momentum : 0;
    u.first_add = t > 1 ? 1 - group.dampening : 1;
  } else {
    u.first_keep = group.beta1;
    u.first_add = 1 - group.beta1;
  }
  u.second_keep = group.beta2;
  u.second_add = 1 - group.beta2;
  double rate = group.lr;
  if (baseline::has_second(kind)) {
    threshold(group, kind, steps_taken, row.tau_prev, &u.old_v, &u.old_0);
    threshold(group, kind, t, row.tau, &u.new_v, &u.new_0);
  }
  if (adam) {
    // m_hat / (sqrt(v_hat) + eps) = m / (sqrt(v) + eps * root) * root / weight
    const double root = std::sqrt(1 - std::pow(group.beta2, t));
    rate *= root / first_weight(group, kind, t);
    u.eps = group.eps * root;
  }
  u.step[kUnder] = rate * now.step[kUnder];
  u.step[kWell] = rate * now.step[kWell];
  u.nesterov = group.nesterov ? group.momentum : 0;
  u.is_nesterov = group.nesterov != 0;
  u.coupled = u.coupled_decay != 0;
  u.routed = u.grad[kUnder] != 1 || u.grad[kWell] != 1;
  u.plain = u.scale == 1 && !u.coupled && !u.routed;
  shared.kind = kind;
  shared.has_noise = u.sigma != 0;
  shared.seed = static_cast<uint64_t>(control.seed);
  shared.counter = static_cast<uint32_t>(control.counter);
  return shared;
}

// What emit needs: live coefficients, and the class of moments `steps_taken` old under `tau`.
Shared emission_of(const Group& group, Kind kind, double steps_taken, double tau,
                   const double live[2]) {
  Shared shared{};
  copy(live, shared.u.live);
  if (baseline::has_second(kind))
    threshold(group, kind, steps_taken, tau, &shared.u.old_v, &shared.u.old_0);
  shared.kind = kind;
  return shared;
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

double standard_deviation(const Statistics& s) {
  if (!(s.numel > 0)) return 0;
  const double mean = s.grad_sum / s.numel, variance = s.grad_sq / s.numel - mean * mean;
  return variance > 0 ? std::sqrt(variance) : 0;
}

int64_t draw_phase(const Control& control) {
  const uint32_t counter[4] = {0, 0, static_cast<uint32_t>(control.counter),
                               baseline::kPhaseStream};
  uint32_t drawn[4];
  philox(static_cast<uint64_t>(control.seed), counter, drawn);
  return static_cast<int64_t>(drawn[0]) < control.threshold ? 1 : 0;
}

// Adds chunk sums in the order of the chunks, whichever thread made them.
void reduce(const Tensor* tensors, const Group* groups, const Work& work,
            const std::vector<Partial>& partials, std::vector<Statistics>& into) {
  for (size_t i = 0; i < work.chunks.size(); ++i) {
    const Chunk& chunk = work.chunks[i];
    const Tensor& tensor = tensors[chunk.tensor];
    if (!tensor.grad) continue;
    Statistics& s = into[static_cast<size_t>(tensor.group)];
    const Partial& p = partials[i];
    s.numel += static_cast<double>(chunk.end - chunk.begin);
    const bool classed = baseline::has_second(kind_of(tensor, groups[tensor.group]));
    s.under += classed ? p.under : std::numeric_limits<double>::quiet_NaN();
    s.grad_sum += p.grad_sum;
    s.grad_sq += p.grad_sq;
    s.update_sq += p.update_sq;
    s.param_sq += p.param_sq;
    s.nonfinite += p.nonfinite;
  }
}

void control_threshold(const Group& group, const Statistics& s, Row& row) {
  row.tau_prev = row.tau;
  if (!(s.numel > 0) || group.rate == 0 || std::isnan(s.under)) return;
  const double moved = row.tau + group.rate * (s.under / s.numel - group.target);
  row.tau = moved < 0 ? 0 : moved > 1 ? 1 : moved;
}

}  // namespace

Status step(const Tensor* tensors, int64_t tensor_count, const Group* groups, Row* rows,
            Statistics* statistics, int64_t group_count, Control* control,
            const Execution& execution) {
  Status status = check(tensors, tensor_count, groups, rows, group_count);
  if (status != Status::kOk) return status;
  if (!control || (group_count && !statistics)) return Status::kNullPointer;
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
  bool last_stepped = false;
  Kind last_kind = Kind::kAdam;
  bool any = false;
  for (int64_t i = 0; i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    if (!t.grad && !t.master) continue;
    any |= t.grad != nullptr;
    const Group& group = groups[t.group];
    const Row& row = rows[t.group];
    const Kind kind = kind_of(t, group);
    const double steps = *t.step;
    const bool stepped = t.grad != nullptr;
    // Most tensors of a group are of one age: they share.
    if (t.group != last_group || steps != last_steps || kind != last_kind ||
        stepped != last_stepped) {
      shared.push_back(stepped ? shared_of(group, row, row.phases[control->phase & 1],
                                           row.phases[next], kind, steps,
                                           deviations[static_cast<size_t>(t.group)], *control)
                               : emission_of(group, kind, steps, row.tau, row.phases[next].live));
      last_group = t.group;
      last_steps = steps;
      last_kind = kind;
      last_stepped = stepped;
    }
    work.add(i, static_cast<int64_t>(shared.size()) - 1, t.numel);
  }
  work.close();
  if (!any) return Status::kOk;

  // The last allocations: from here on nothing can fail.
  std::vector<Partial> partials(work.chunks.size());
  std::vector<Statistics> sums(static_cast<size_t>(group_count), Statistics{});
  const KernelTable& kernels = kernels_of(isa);
  for_each_task(execution, static_cast<int64_t>(work.tasks.size()), [&](int64_t task) {
    const Task& range = work.tasks[static_cast<size_t>(task)];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& chunk = work.chunks[static_cast<size_t>(i)];
      const Tensor& tensor = tensors[chunk.tensor];
      const Shared& s = shared[static_cast<size_t>(chunk.shared)];
      if (tensor.grad) {
        kernels.update(tensor, s, chunk.begin, chunk.end, &partials[static_cast<size_t>(i)]);
      } else {
        kernels.emit(tensor, s, chunk.begin, chunk.end);
      }
    }
  });

  reduce(tensors, groups, work, partials, sums);
  for (int64_t i = 0; i < tensor_count; ++i) {
    if (tensors[i].grad) *tensors[i].step += 1;
  }
  for (int64_t g = 0; g < group_count; ++g) {
    const Statistics& s = sums[static_cast<size_t>(g)];
    control_threshold(groups[g], s, rows[g]);
    copy(rows[g].phases[next].grad, rows[g].grad);
    copy(rows[g].phases[next].live, rows[g].emitted);
    if (s.numel > 0) statistics[g] = s;
  }
  control->phase = next;
  control->counter += 1;
  return Status::kOk;
}

Status emit(const Tensor* tensors, int64_t tensor_count, const Group* groups, const Row* rows,
            int64_t group_count, const Execution& execution) {
  Status status = check(tensors, tensor_count, groups, rows, group_count);
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
    shared.push_back(emission_of(group, kind_of(t, group), *t.step, row.tau_prev, row.emitted));
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
  const auto r = baseline::philox4x32(seed, {{counter[0], counter[1], counter[2], counter[3]}});
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
    case Status::kBadGroup:
      return "a tensor names a group that does not exist";
    case Status::kBadDType:
      return "unknown dtype";
    case Status::kBadRule:
      return "unknown rule";
    case Status::kStatelessRow:
      return "under and well columns differ in a group that keeps no optimization state "
             "(modulated=False under rule 'sgd')";
    case Status::kUnknownIsa:
      return "unknown instruction set; the names are scalar, avx2, avx512, neon";
    case Status::kUnsupportedIsa:
      return "this build or this processor lacks the instruction set";
  }
  return "unknown status";
}

}  // namespace aim
