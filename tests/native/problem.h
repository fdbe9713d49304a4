// One parameter with everything around it, in memory that notices what should not be written:
// shared by the native tests.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "aim/step.h"

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

inline constexpr size_t kGuard = 64;
inline constexpr unsigned char kCanary = 0xA5;

// Heap memory of exactly the size asked for plus guards, so that overruns hit canaries (and
// AddressSanitizer's own); on 16 bytes, or at an odd element offset.
class Buffer {
 public:
  Buffer(size_t count, size_t itemsize, bool aligned)
      : bytes_(count * itemsize), offset_(kGuard + (aligned ? 0 : itemsize)) {
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

inline size_t size_of(aim::DType dtype) {
  return dtype == aim::DType::kFloat64 ? 8 : dtype == aim::DType::kFloat32 ? 4 : 2;
}

// Random numbers as the storage type holds them; 16-bit types get random bits without infinities.
inline void fill(Buffer& buffer, size_t count, aim::DType dtype, double scale, bool positive,
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

// What a parameter keeps in fewer bits, and what is done beside its update.
struct Keep {
  aim::Moments moments = aim::Moments::kWide;
  aim::Weights weights = aim::Weights::kNearest;
  bool stochastic = false, ema = false, zero_grad = false;
  int64_t offset = 0;

  bool any() const {
    return moments != aim::Moments::kWide || weights != aim::Weights::kNearest || ema || zero_grad;
  }
  // As far as the type knows it.
  Keep of(aim::DType dtype) const {
    Keep kept = *this;
    if (dtype == aim::DType::kFloat64) kept.moments = aim::Moments::kWide;
    const bool known = dtype == aim::DType::kBFloat16 ||
                       (dtype == aim::DType::kFloat16 && weights == aim::Weights::kKahan);
    if (!known) kept.weights = aim::Weights::kNearest;
    return kept;
  }
};

struct Case {
  aim::Rule rule;
  aim::DType dtype;
  int64_t numel;
  bool live, anchored, noisy, momentum, state;
  int32_t flags = 0;  // a sum of aim::Flag
  Keep keep{};
};

// A moment as it is stored: random numbers, rounded down to bfloat16, or random codes.
inline void fill_moment(Buffer& buffer, Buffer& scale, const Case& c, double deviation,
                        bool positive, std::mt19937& random) {
  const size_t count = static_cast<size_t>(c.numel);
  const bool wide = c.dtype == aim::DType::kFloat64;
  if (c.keep.moments == aim::Moments::kWide) {
    fill(buffer, count, wide ? c.dtype : aim::DType::kFloat32, deviation, positive, random);
  } else if (c.keep.moments == aim::Moments::kBFloat16) {
    Buffer whole(count, sizeof(float), true);
    fill(whole, count, aim::DType::kFloat32, deviation, positive, random);
    for (size_t i = 0; i < count; ++i) buffer.as<uint16_t>()[i] = whole.as<uint16_t>()[2 * i + 1];
  } else {
    for (size_t i = 0; i < count; ++i) buffer.data()[i] = static_cast<unsigned char>(random());
    for (size_t i = 0; i * aim::kPackedBlock < count; ++i)
      scale.data()[i] = static_cast<unsigned char>(110 + random() % 16);
  }
}

// Every rule in all its variants.
inline std::vector<Case> variants(aim::DType dtype, int64_t numel, bool live, bool noisy) {
  using aim::Rule;
  return {{Rule::kAdamW, dtype, numel, live, noisy, noisy, false, true},
          {Rule::kAdam, dtype, numel, live, false, noisy, false, true, aim::kFisher},
          {Rule::kAdamW, dtype, numel, live, noisy, noisy, false, true, aim::kAmsgrad},
          {Rule::kSgd, dtype, numel, live, false, noisy, false, false},
          {Rule::kSgd, dtype, numel, live, false, noisy, true, false},
          {Rule::kSgd, dtype, numel, live, true, noisy, false, true},
          {Rule::kSgd, dtype, numel, live, false, noisy, true, true},
          {Rule::kAdagrad, dtype, numel, live, false, noisy, false, false},
          {Rule::kAdagrad, dtype, numel, live, false, noisy, false, true},
          {Rule::kRmsprop, dtype, numel, live, false, noisy, false, false},
          {Rule::kRmsprop, dtype, numel, live, true, noisy, true, false},
          {Rule::kRmsprop, dtype, numel, live, false, noisy, false, true},
          {Rule::kRmsprop, dtype, numel, live, false, noisy, true, true, aim::kCentered},
          {Rule::kLion, dtype, numel, live, true, noisy, false, false},
          {Rule::kLion, dtype, numel, live, false, noisy, false, true, aim::kGrad}};
}

// One parameter with everything around it.
struct Problem {
  Problem(const Case& c, unsigned seed, bool aligned = false)
      : shape(c),
        param(count(), size_of(c.dtype), aligned),
        grad(count(), size_of(c.dtype), aligned),
        m(count(), moment(), aligned),
        v(count(), moment(), aligned),
        extra(count(), moment(), aligned),
        master(count(), wide(), aligned),
        anchor(count(), wide(), aligned),
        m_scale(blocks(), 1, aligned),
        v_scale(blocks(), 1, aligned),
        extra_scale(blocks(), 1, aligned),
        rest(count(), 2, aligned),
        ema(count(), wide(), aligned) {
    std::mt19937 random(seed);
    const aim::DType state =
        c.dtype == aim::DType::kFloat64 ? aim::DType::kFloat64 : aim::DType::kFloat32;
    fill(param, count(), c.dtype, 1, false, random);
    fill(grad, count(), c.dtype, 0.1, false, random);
    fill_moment(m, m_scale, c, 0.05, false, random);
    fill_moment(v, v_scale, c, 0.1, true, random);
    fill_moment(extra, extra_scale, c, 0.1, true, random);
    fill(master, count(), state, 1, false, random);
    fill(anchor, count(), state, 1, false, random);
    if (size_of(c.dtype) == 2) fill(rest, count(), c.dtype, 1, false, random);
    fill(ema, count(), state, 1, false, random);
    const bool adam = c.rule == aim::Rule::kAdam || c.rule == aim::Rule::kAdamW;
    const bool sgd = c.rule == aim::Rule::kSgd;
    tensor.param = param.data();
    tensor.grad = grad.data();
    const bool lion = c.rule == aim::Rule::kLion;
    if (adam || lion || c.state || (sgd && c.momentum)) tensor.exp_avg = m.data();
    if (!(sgd || lion) || c.state) tensor.exp_avg_sq = v.data();
    if ((c.flags & aim::kAmsgrad) || (c.rule == aim::Rule::kRmsprop && c.momentum))
      tensor.extra = extra.data();
    if (c.live) tensor.master = master.data();
    if (c.anchored) tensor.anchor = anchor.data();
    tensor.step = &step;
    tensor.numel = c.numel;
    tensor.first = (int64_t{1} << 33) + 3;
    tensor.offset = c.keep.offset;
    tensor.dtype = static_cast<int32_t>(c.dtype);
    tensor.moments = static_cast<int32_t>(c.keep.moments);
    tensor.weights = static_cast<int32_t>(c.keep.weights);
    tensor.stochastic = c.keep.stochastic;
    tensor.zero_grad = c.keep.zero_grad;
    if (c.live && c.numel % 3 != 0) tensor.flags = aim::kAdopts;
    if (c.keep.moments == aim::Moments::kInt8) {
      tensor.exp_avg_scale = m_scale.data();
      tensor.exp_avg_sq_scale = v_scale.data();
      tensor.extra_scale = extra_scale.data();
    }
    if (c.keep.weights == aim::Weights::kSplit || c.keep.weights == aim::Weights::kKahan)
      tensor.rest = rest.data();
    if (c.keep.ema) tensor.ema = ema.data();
    group.lr = 1e-2;
    group.beta1 = 0.9;
    group.beta2 = 0.99;
    group.eps = 1e-8;
    group.weight_decay = 0.1;
    group.momentum = c.momentum ? 0.9 : 0;
    group.scale = 1;
    group.target = group.rate = 0.1;
    group.rule = static_cast<int32_t>(c.rule);
    group.flags = c.flags;
    group.ema_decay = 0.9;
    group.lr_decay = c.rule == aim::Rule::kAdagrad ? 0.05 : 0;
    double* columns = reinterpret_cast<double*>(&row);
    for (size_t i = 0; i < sizeof row / sizeof(double); ++i) columns[i] = 1;
    row.tau_prev = 0.4;
    row.tau = 0.5;
    row.noise = c.noisy ? 0.3 : 0;
    if (tensor.exp_avg && tensor.exp_avg_sq) {
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
  size_t moment() const {
    return shape.keep.moments == aim::Moments::kWide       ? wide()
           : shape.keep.moments == aim::Moments::kBFloat16 ? 2
                                                           : 1;
  }
  size_t blocks() const {
    return shape.keep.moments == aim::Moments::kInt8
               ? (count() + aim::kPackedBlock - 1) / aim::kPackedBlock
               : 0;
  }
  bool guards_intact() const {
    for (const Buffer* b : {&param, &grad, &m, &v, &extra, &master, &anchor, &m_scale, &v_scale,
                            &extra_scale, &rest, &ema}) {
      if (!b->guards_intact()) return false;
    }
    return true;
  }
  bool same_moments(const Problem& other) const {
    return m == other.m && v == other.v && extra == other.extra && m_scale == other.m_scale &&
           v_scale == other.v_scale && extra_scale == other.extra_scale;
  }
  bool same_memory(const Problem& other) const {
    return param == other.param && grad == other.grad && same_moments(other) &&
           master == other.master && anchor == other.anchor && rest == other.rest &&
           ema == other.ema && step == other.step;
  }
  bool equals(const Problem& other) const {
    return same_memory(other) && !std::memcmp(&row, &other.row, sizeof row) &&
           !std::memcmp(&statistics, &other.statistics, sizeof statistics) &&
           !std::memcmp(&control, &other.control, sizeof control);
  }
  aim::Status run(const char* isa, int threads) {
    return aim::step({&tensor, &group, &row, &statistics, &control, 1, 1}, {nullptr, threads, isa});
  }

  Case shape;
  Buffer param, grad, m, v, extra, master, anchor, m_scale, v_scale, extra_scale, rest, ema;
  float step = 3;
  aim::Tensor tensor{};
  aim::Group group{};
  aim::Row row;
  aim::Statistics statistics;
  aim::Control control;
};

inline std::string name_of(const Case& c) {
  char text[240];
  std::snprintf(text, sizeof text,
                "rule %d dtype %d numel %lld live %d anchor %d noise %d momentum %d state %d "
                "flags %d moments %d weights %d stochastic %d ema %d zero_grad %d offset %lld",
                static_cast<int>(c.rule), static_cast<int>(c.dtype),
                static_cast<long long>(c.numel), c.live, c.anchored, c.noisy, c.momentum, c.state,
                c.flags, static_cast<int>(c.keep.moments), static_cast<int>(c.keep.weights),
                c.keep.stochastic, c.keep.ema, c.keep.zero_grad,
                static_cast<long long>(c.keep.offset));
  return text;
}

inline bool near(double a, double b, double scale) {
  return (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= 1e-4 * scale + 1e-30;
}

// Counts to the bit; sums, which are added up in another order, to what float32 partial sums lose.
inline void same_statistics(const aim::Statistics& a, const aim::Statistics& b,
                            const std::string& what) {
  expect(a.numel == b.numel && a.nonfinite == b.nonfinite &&
             (a.under == b.under || (std::isnan(a.under) && std::isnan(b.under))),
         "counts, " + what);
  expect(near(a.grad_sum, b.grad_sum, std::sqrt(a.numel * a.grad_sq)) &&
             near(a.grad_sq, b.grad_sq, a.grad_sq) && near(a.update_sq, b.update_sq, a.update_sq) &&
             near(a.param_sq, b.param_sq, a.param_sq),
         "sums, " + what);
}
