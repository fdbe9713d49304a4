// The fused step: gradient -> moments -> optimization state -> update -> live weights, in one pass
// over memory.
//
// Plain structs, raw pointers, status codes: no torch, no Python. docs/design.md gives the formulae
// and says what each table column means; aim_kernels/step/layout.py holds the same layouts for
// numpy, and a test compares the two.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aim {

enum class Status : int32_t {
  kOk = 0,
  kNullPointer,    // a pointer that the rule or the state needs is absent
  kBadSize,        // a negative count or a total that overflows 64 bits
  kMisaligned,     // an address is no multiple of its type's size
  kBadGroup,       // a tensor names a group that does not exist
  kBadDType,       // not a DType
  kBadRule,        // not a Rule
  kBadPacking,     // not a Moments or Weights, or not one for this DType
  kStatelessRow,   // under and well columns differ in a group that keeps no optimization state
  kUnknownIsa,     // no instruction set has this name
  kUnsupportedIsa  // this build or this processor lacks it
};
const char* describe(Status status);

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Rule : int32_t { kAdamW, kAdam, kSgd, kAdagrad, kRmsprop, kLion };

// Index into every {under, well} pair.
enum Class : int { kUnder = 0, kWell = 1 };

// Variants of a rule; what the classes go by, where it is not the signal-to-noise ratio.
enum Flag : int32_t { kAmsgrad = 1, kCentered = 2, kFisher = 4, kGrad = 8 };

// How moments are stored: in the arithmetic type, as bfloat16, or in 8 bits with one exponent for
// every kPackedBlock elements.
enum class Moments : int32_t { kWide, kBFloat16, kInt8 };

// What a 16-bit parameter without a master keeps of its true weights: what the nearest number of
// its type holds; the same, rounded to either neighbour at random; the float32 weights, as the
// parameter and the 16 bits that it lacks; the parameter and what rounding took, in its own type.
enum class Weights : int32_t { kNearest, kStochastic, kSplit, kKahan };

// Of a tensor. kAdopts: while the module holds undegraded weights they are what counts, and a
// master takes the elements that somebody has changed there since the last step. kFrozen: nothing
// has ever moved it, so it is well-optimized as a whole; it has a master, but neither moments nor a
// step count.
enum Mark : int32_t { kAdopts = 1, kFrozen = 2 };

// One parameter. Master, anchor and average are float32 (float64 for float64 parameters).
struct Tensor {
  void* param;                // live weights; the true weights where there is no master
  void* grad;                 // in the parameter's dtype and memory order; null: not stepped
  void* exp_avg;              // first moment, or SGD's momentum buffer
  void* exp_avg_sq;           // second moment, or Adagrad's sum
  void* extra;                // a third moment: AMSGrad's maximum, RMSprop's momentum buffer
  void* master;               // true weights, where live weights exist
  const void* anchor;         // null: zero; `ema`: the average after this step
  float* step;                // steps taken, incremented; null: frozen, or nothing is kept
  uint8_t* exp_avg_scale;     // Moments::kInt8: a block's exponent, as float32 has it
  uint8_t* exp_avg_sq_scale;  // the same of the second moment
  uint8_t* extra_scale;       // and of the third
  void* rest;                 // 16 bits an element: of Weights::kSplit and kKahan
  void* ema;                  // moving average of the true weights; null: none
  int64_t numel;
  int64_t first;   // global index of the first element
  int64_t offset;  // its index in the whole parameter, of which other processes may have parts
  int32_t group;
  int32_t dtype;
  int32_t uncounted;   // not 0: another process adds it to the statistics
  int32_t moments;     // a Moments
  int32_t weights;     // a Weights
  int32_t stochastic;  // not 0: stored moments are rounded to either neighbour at random
  int32_t zero_grad;   // not 0: the gradient is left as zeros
  int32_t flags;       // a sum of Mark
};

struct Group {
  // RMSprop's alpha is beta2; centered, it is beta1 as well.
  double lr, beta1, beta2, eps, weight_decay, momentum, dampening;
  double scale;     // multiplies the gradient first; -1 maximizes
  double target;    // q of the threshold controller
  double rate;      // its step size; 0 holds the threshold
  double lr_decay;  // Adagrad's
  double ema_decay;
  // Devices: one number in the device's memory that is read instead of `lr`; null: `lr`.
  const void* lr_tensor;
  int32_t rule;
  int32_t nesterov;
  int32_t lr_dtype;  // of lr_tensor: kFloat32 or kFloat64
  int32_t flags;     // a sum of Flag
};

struct PhaseRow {
  double grad[2], step[2], live[2];
};

struct Row {
  double grad[2];  // for the next step, latched when the live weights were emitted
  double tau_prev, tau, noise;
  double emitted[2];  // live coefficients of the weights that the module holds
  PhaseRow phases[2];
};

struct Statistics {
  double numel, under, grad_sum, grad_sq, update_sq, param_sq, nonfinite;
};

struct Control {
  int64_t seed, counter;
  int64_t threshold;  // the next phase is auxiliary where a uniform 32-bit draw is below it
  int64_t phase;
};

// What a call reads and writes; fields that it does not speak of may be null.
struct StepTables {
  const Tensor* tensors;   // [tensor_count], in the order of summation
  const Group* groups;     // [group_count]
  Row* rows;               // [group_count]; a group's coefficients and thresholds
  Statistics* statistics;  // [group_count], of the last step that counted anything in the group
  Control* control;        // one: seed, counter and phase of the optimizer
  int64_t tensor_count;
  int64_t group_count;
};

// Elements of one unit of work; chunks start at multiples of it from the start of a tensor.
inline constexpr int64_t kChunk = 16384;

// Elements that share an exponent where moments have 8 bits, counted from the start of a tensor.
inline constexpr int64_t kPackedBlock = 128;

// Runs `body(data)` on up to `threads` threads, the caller's included, and returns when all have
// finished. The signature is that of GOMP_parallel, so a caller may lend the OpenMP pool that its
// process already has.
using ThreadPool = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Execution {
  ThreadPool pool;  // lent by the caller; null: threads made for the call
  int32_t threads;  // at least 1
  const char* isa;  // "scalar", "avx2", "avx512", "neon"; null: the best one here
};

// One optimizer step over all tensors. On any status but kOk nothing was written.
Status step(const StepTables& tables, const Execution& execution);

// The same in two parts, for tensors that several processes hold: update() moves the tensors and
// their step counts, leaves all other tables alone and overwrites `sums` ([group_count]) with what
// it measured; finish() takes the sums over all processes and moves thresholds, latched columns,
// statistics and control. A group whose numel is 0 there keeps threshold and statistics. finish()
// needs no tensors.
Status update(const StepTables& tables, const Execution& execution, Statistics* sums);
Status finish(const StepTables& tables, const Statistics* sums);

// Writes the live weights of all tensors that have a master, from stored state, `tau_prev` and the
// emitted columns. Needs tensors, groups and rows.
Status emit(const StepTables& tables, const Execution& execution);

// The sum of squares of all gradients but the uncounted ones', in float64: for clipping by their
// norm, in one read. Adds in a fixed order. Needs only tensors.
Status squares(const StepTables& tables, const Execution& execution, double* sum);

// The part of their checks that needs no row: what may be asked of tables that go to a device.
// Needs tensors and groups.
Status check(const StepTables& tables);

// Philox4x32-10 output for (seed, counter words): what noise and phases are drawn with.
void philox(uint64_t seed, const uint32_t counter[4], uint32_t output[4]);

}  // namespace aim
