// The C++ core without Python, for sanitizers: every kernel of every instruction set that this
// processor has, and the widest one lowered to whatever the compiler has, must agree with the
// scalar kernels to the bit, stay inside its buffers, and change nothing when it refuses.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "aim/isa.h"
#include "aim/step.h"
#include "cpu/kernels.h"

namespace aim {
// Kernels for 64-byte vectors, compiled without AVX-512: tests/native/kernels_lowered.cpp.
namespace lowered {
extern const KernelTable kKernels;
}
}  // namespace aim

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

constexpr size_t kGuard = 64;
constexpr unsigned char kCanary = 0xA5;

// Heap memory of exactly the size asked for plus guards, at an odd element offset, so that overruns
// hit canaries (and AddressSanitizer's own).
class Buffer {
 public:
  Buffer(size_t count, size_t itemsize) : bytes_(count * itemsize), offset_(kGuard + itemsize) {
    memory_.assign(bytes_ + 2 * kGuard + itemsize, kCanary);
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(memory_.data() + offset_);
  }
  unsigned char* data() { return memory_.data() + offset_; }
  bool guards_intact() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      if ((i < offset_ || i >= offset_ + bytes_) && memory_[i] != kCanary) return false;
    }
    return true;
  }
  bool operator==(const Buffer& other) const { return memory_ == other.memory_; }

 private:
  size_t bytes_, offset_;
  std::vector<unsigned char> memory_;
};

size_t size_of(aim::DType dtype) {
  return dtype == aim::DType::kFloat64 ? 8 : dtype == aim::DType::kFloat32 ? 4 : 2;
}

// Random numbers as the storage type holds them; 16-bit types get random bits without infinities.
void fill(Buffer& buffer, size_t count, aim::DType dtype, double scale, bool positive,
          std::mt19937& random) {
  std::normal_distribution<double> normal(0, scale);
  for (size_t i = 0; i < count; ++i) {
    double x = normal(random);
    if (positive) x = x * x;
    if (dtype == aim::DType::kFloat64) {
      buffer.as<double>()[i] = x;
    } else if (dtype == aim::DType::kFloat32) {
      buffer.as<float>()[i] = static_cast<float>(x);
    } else {
      const unsigned exponent = dtype == aim::DType::kBFloat16 ? 0x7F80 : 0x7C00;
      unsigned bits = random() & 0xFFFF;
      if ((bits & exponent) == exponent) bits &= ~0x4000u;
      // Large values would overflow squares; keep the exponent small.
      bits &= ~0x4000u;
      buffer.as<uint16_t>()[i] = static_cast<uint16_t>(bits);
    }
  }
}

struct Case {
  aim::Rule rule;
  aim::DType dtype;
  int64_t numel;
  bool live, anchored, noisy, momentum, state;
};

// One parameter with everything around it.
struct Problem {
  Problem(const Case& c, unsigned seed)
      : shape(c),
        param(count(), size_of(c.dtype)),
        grad(count(), size_of(c.dtype)),
        m(count(), wide()),
        v(count(), wide()),
        master(count(), wide()),
        anchor(count(), wide()) {
    std::mt19937 random(seed);
    const aim::DType state =
        c.dtype == aim::DType::kFloat64 ? aim::DType::kFloat64 : aim::DType::kFloat32;
    fill(param, count(), c.dtype, 1, false, random);
    fill(grad, count(), c.dtype, 0.1, false, random);
    fill(m, count(), state, 0.05, false, random);
    fill(v, count(), state, 0.1, true, random);
    fill(master, count(), state, 1, false, random);
    fill(anchor, count(), state, 1, false, random);
    tensor = {param.data(),
              grad.data(),
              c.rule != aim::Rule::kSgd || c.momentum || c.state ? m.data() : nullptr,
              c.rule != aim::Rule::kSgd || c.state ? v.data() : nullptr,
              c.live ? master.data() : nullptr,
              c.anchored ? anchor.data() : nullptr,
              &step,
              c.numel,
              (int64_t{1} << 33) + 3,
              0,
              static_cast<int32_t>(c.dtype)};
    group = {1e-2, 0.9, 0.99, 1e-8, 0.1,     c.momentum ? 0.9 : 0.0,
             0.0,  1.0, 0.1,  0.1,  nullptr, static_cast<int32_t>(c.rule),
             0,    0,   0};
    double* columns = reinterpret_cast<double*>(&row);
    for (size_t i = 0; i < sizeof row / sizeof(double); ++i) columns[i] = 1;
    row.tau_prev = 0.4;
    row.tau = 0.5;
    row.noise = c.noisy ? 0.3 : 0;
    if (tensor.exp_avg_sq) {
      row.grad[aim::kWell] = 0.5;
      for (aim::PhaseRow& phase : row.phases) {
        phase.step[aim::kWell] = 0.25;
        phase.live[aim::kWell] = 0.75;
      }
    }
    statistics = {1000, 0, 1, 20, 0, 0, 0};
    control = {12345, 7, int64_t{1} << 31, 0};
  }

  size_t count() const { return static_cast<size_t>(shape.numel); }
  size_t wide() const { return shape.dtype == aim::DType::kFloat64 ? 8 : 4; }
  bool guards_intact() const {
    for (const Buffer* b : {&param, &grad, &m, &v, &master, &anchor}) {
      if (!b->guards_intact()) return false;
    }
    return true;
  }
  bool equals(const Problem& other) const {
    return param == other.param && grad == other.grad && m == other.m && v == other.v &&
           master == other.master && anchor == other.anchor && step == other.step &&
           !std::memcmp(&row, &other.row, sizeof row) &&
           !std::memcmp(&statistics, &other.statistics, sizeof statistics) &&
           !std::memcmp(&control, &other.control, sizeof control);
  }
  aim::Status run(const char* isa, int threads) {
    return aim::step(&tensor, 1, &group, &row, &statistics, 1, &control, {nullptr, threads, isa});
  }

  Case shape;
  Buffer param, grad, m, v, master, anchor;
  float step = 3;
  aim::Tensor tensor;
  aim::Group group;
  aim::Row row;
  aim::Statistics statistics;
  aim::Control control;
};

std::string name_of(const Case& c) {
  char text[160];
  std::snprintf(text, sizeof text,
                "rule %d dtype %d numel %lld live %d anchor %d noise %d momentum %d state %d",
                static_cast<int>(c.rule), static_cast<int>(c.dtype),
                static_cast<long long>(c.numel), c.live, c.anchored, c.noisy, c.momentum, c.state);
  return text;
}

void instruction_sets_agree(const Case& c) {
  Problem expected(c, 1);
  for (int step = 0; step < 3; ++step)
    expect(expected.run("scalar", 1) == aim::Status::kOk, "scalar " + name_of(c));
  expect(expected.guards_intact(), "guards, scalar, " + name_of(c));
  aim::IsaInfo isas[8];
  int count = 0;
  aim::list_isas(isas, 8, &count);
  for (int i = 0; i < count; ++i) {
    if (!isas[i].supported) continue;
    for (int threads : {1, 3}) {
      Problem p(c, 1);
      for (int step = 0; step < 3; ++step)
        expect(p.run(isas[i].name, threads) == aim::Status::kOk, "run " + name_of(c));
      expect(p.guards_intact(), std::string("guards, ") + isas[i].name + ", " + name_of(c));
      expect(p.equals(expected), std::string("bits, ") + isas[i].name + ", " + name_of(c));
    }
  }
}

// The 16-lane kernels against the scalar ones, chunk by chunk.
void lowered_kernels_agree(const Case& c) {
  Problem a(c, 2), b(c, 2);
  aim::Shared shared{};
  aim::Uniforms<double>& u = shared.u;
  u.scale = -1;
  u.coupled_decay = c.rule == aim::Rule::kAdamW ? 0 : 0.1;
  u.decay = 0.999;
  u.grad[0] = 1;
  u.grad[1] = 0.5;
  u.step[0] = 0.01;
  u.step[1] = 0.002;
  u.live[0] = 1;
  u.live[1] = 0.75;
  u.sigma = 0.01;
  u.first_keep = 0.9;
  u.first_add = 0.1;
  u.second_keep = 0.99;
  u.second_add = 0.01;
  u.old_v = 0.1;
  u.new_v = 0.2;
  u.old_0 = u.new_0 = 1e-12;
  u.eps = 1e-8;
  u.nesterov = 0.9;
  u.coupled = u.coupled_decay != 0;
  u.routed = true;
  u.is_nesterov = true;
  if (!a.tensor.exp_avg_sq) u.grad[1] = u.grad[0], u.step[1] = u.step[0], u.live[1] = u.live[0];
  shared.kind = c.rule != aim::Rule::kSgd ? aim::Kind::kAdam
                : c.state ? (c.momentum ? aim::Kind::kSgdMomentumState : aim::Kind::kSgdState)
                          : (c.momentum ? aim::Kind::kSgdMomentum : aim::Kind::kSgd);
  shared.has_noise = c.noisy;
  shared.seed = 99;
  shared.counter = 5;
  aim::Partial pa{}, pb{};
  aim::kernels_of("scalar").update(a.tensor, shared, 0, c.numel, &pa);
  aim::lowered::kKernels.update(b.tensor, shared, 0, c.numel, &pb);
  if (!a.tensor.exp_avg_sq) pa.under = pb.under = 0;  // no classes there
  expect(a.equals(b) && !std::memcmp(&pa, &pb, sizeof pa), "lowered bits, " + name_of(c));
  if (c.live) {
    aim::kernels_of("scalar").emit(a.tensor, shared, 0, c.numel);
    aim::lowered::kKernels.emit(b.tensor, shared, 0, c.numel);
    expect(a.equals(b), "lowered emit, " + name_of(c));
  }
  expect(b.guards_intact(), "guards, lowered, " + name_of(c));
}

void refusals_change_nothing() {
  const Case c{aim::Rule::kAdamW, aim::DType::kFloat32, 100, false, false, false, false, true};
  const auto refused = [&](const char* what, aim::Status status, auto spoil,
                           const char* isa = "scalar") {
    Problem p(c, 3), before(c, 3);
    spoil(p);
    const aim::Status got = p.run(isa, 2);
    expect(got == status, std::string("status of ") + what + ": " + aim::describe(got));
    expect(p.param == before.param && p.m == before.m && p.v == before.v && p.step == before.step &&
               !std::memcmp(&p.control, &before.control, sizeof p.control),
           std::string("unchanged by ") + what);
  };
  refused("no moment", aim::Status::kNullPointer, [](Problem& p) { p.tensor.exp_avg = nullptr; });
  refused("no step", aim::Status::kNullPointer, [](Problem& p) { p.tensor.step = nullptr; });
  refused("negative size", aim::Status::kBadSize, [](Problem& p) { p.tensor.numel = -1; });
  refused("overflowing index", aim::Status::kBadSize,
          [](Problem& p) { p.tensor.first = INT64_MAX - 5; });
  refused("bad group", aim::Status::kBadGroup, [](Problem& p) { p.tensor.group = 1; });
  refused("bad dtype", aim::Status::kBadDType, [](Problem& p) { p.tensor.dtype = 4; });
  refused("bad rule", aim::Status::kBadRule, [](Problem& p) { p.group.rule = 3; });
  refused("unknown isa", aim::Status::kUnknownIsa, [](Problem&) {}, "sse");
}

}  // namespace

int main() {
  using aim::DType;
  using aim::Rule;
  const int64_t sizes[] = {1, 15, 16, 17, 70, 1023, 1041, aim::kChunk, aim::kChunk + 5};
  int cases = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (bool live : {false, true}) {
      for (bool noisy : {false, true}) {
        for (int64_t numel : sizes) {
          const Case all[] = {{Rule::kAdamW, dtype, numel, live, noisy, noisy, false, true},
                              {Rule::kAdam, dtype, numel, live, false, noisy, false, true},
                              {Rule::kSgd, dtype, numel, live, false, noisy, false, false},
                              {Rule::kSgd, dtype, numel, live, false, noisy, true, false},
                              {Rule::kSgd, dtype, numel, live, true, noisy, false, true},
                              {Rule::kSgd, dtype, numel, live, false, noisy, true, true}};
          for (const Case& c : all) {
            instruction_sets_agree(c);
            if (numel <= aim::kChunk) lowered_kernels_agree(c);
            ++cases;
          }
        }
      }
    }
  }
  refusals_change_nothing();
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
