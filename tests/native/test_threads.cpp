// The C++ core on several threads, for ThreadSanitizer: tensors of several sizes, types and groups
// in one step, on threads made for the call, on a pool that the caller lends, on a pool that has
// fewer threads than were asked for, and from two threads at once. Whoever does the work, the bits
// are those of one thread.
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "aim/isa.h"
#include "aim/step.h"
#include "bench/stream.h"
#include "problem.h"

namespace {

// A pool as torch's: its threads outlive the call, and know what runs by a lock only.
class Pool {
 public:
  explicit Pool(unsigned threads) {
    for (unsigned i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> hold(lock_);
      stopped_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  void run(void (*body)(void*), void* data) {
    {
      std::lock_guard<std::mutex> hold(lock_);
      body_ = body;
      data_ = data;
      busy_ = threads_.size();
      ++round_;
    }
    wake_.notify_all();
    body(data);
    std::unique_lock<std::mutex> hold(lock_);
    done_.wait(hold, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    for (long seen = 0;;) {
      std::unique_lock<std::mutex> hold(lock_);
      wake_.wait(hold, [&] { return stopped_ || round_ != seen; });
      if (stopped_) return;
      seen = round_;
      const auto body = body_;
      void* const data = data_;
      hold.unlock();
      body(data);
      hold.lock();
      if (--busy_ == 0) done_.notify_all();
    }
  }

  std::mutex lock_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  void (*body_)(void*) = nullptr;
  void* data_ = nullptr;
  size_t busy_ = 0;
  long round_ = 0;
  bool stopped_ = false;
};

Pool* pool = nullptr;

void lent(void (*body)(void*), void* data, unsigned, unsigned) { pool->run(body, data); }

// Two threads, however many were asked for: OpenMP may give less.
void short_of_threads(void (*body)(void*), void* data, unsigned, unsigned) {
  std::thread other(body, data);
  body(data);
  other.join();
}

constexpr int64_t kGroups = 3;

// Several parameters in three groups; every third has no gradient in every second step.
struct Model {
  Model() {
    using aim::DType;
    using aim::Rule;
    const Rule rules[kGroups] = {Rule::kAdamW, Rule::kSgd, Rule::kAdam};
    const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat64, DType::kFloat16};
    const int64_t sizes[] = {1, 2 * aim::kChunk + 3, 70, 0, aim::kChunk, 5 * aim::kChunk + 1, 1041};
    unsigned seed = 1;
    for (int32_t g = 0; g < kGroups; ++g) {
      for (int64_t size : sizes) {
        const Case c{rules[g], dtypes[seed % 4], size, g != 2, g == 0, seed % 2 == 0, g == 1, true};
        problems.push_back(std::make_unique<Problem>(c, seed++));
        problems.back()->tensor.group = g;
      }
      groups[g] = problems.back()->group;
      rows[g] = problems.back()->row;
      rows[g].noise = 0.3;
      statistics[g] = problems.back()->statistics;
    }
    control = problems.back()->control;
  }

  std::vector<aim::Tensor> tensors(int step) const {
    std::vector<aim::Tensor> result;
    int64_t first = 0;
    for (size_t i = 0; i < problems.size(); ++i) {
      result.push_back(problems[i]->tensor);
      result.back().first = first;
      first += result.back().numel;
      if (step % 2 && i % 3 == 0) result.back().grad = nullptr;
    }
    return result;
  }

  void run(int steps, const aim::Execution& how, const std::string& what) {
    for (int step = 0; step < steps; ++step) {
      const std::vector<aim::Tensor> table = tensors(step);
      const int64_t count = static_cast<int64_t>(table.size());
      const aim::StepTables tables{table.data(), groups, rows,   statistics,
                                   &control,     count,  kGroups};
      expect(aim::step(tables, how) == aim::Status::kOk, "step, " + what);
      expect(aim::emit(tables, how) == aim::Status::kOk, "emit, " + what);
    }
  }

  bool equals(const Model& other) const {
    for (size_t i = 0; i < problems.size(); ++i) {
      const Problem &a = *problems[i], &b = *other.problems[i];
      if (!(a.param == b.param && a.m == b.m && a.v == b.v && a.extra == b.extra &&
            a.master == b.master && a.step == b.step && a.guards_intact())) {
        return false;
      }
    }
    return !std::memcmp(rows, other.rows, sizeof rows) &&
           !std::memcmp(statistics, other.statistics, sizeof statistics) &&
           !std::memcmp(&control, &other.control, sizeof control);
  }

  std::vector<std::unique_ptr<Problem>> problems;
  aim::Group groups[kGroups];
  aim::Row rows[kGroups];
  aim::Statistics statistics[kGroups];
  aim::Control control;
};

int streams(const aim::Execution& how, const std::string& what) {
  Problem p({aim::Rule::kAdamW, aim::DType::kFloat32, 3 * aim::kChunk + 7, true, false, false,
             false, true},
            1);
  const aim::Tensor tensors[] = {p.tensor};
  const int64_t chunks[] = {0, 1024};
  for (int64_t chunk : chunks) {
    expect(aim::bench::stream(tensors, 1, {true, false, chunk}, 0.5f, how) == aim::Status::kOk,
           "stream, " + what);
  }
  expect(p.guards_intact(), "guards of stream, " + what);
  return 2;
}

}  // namespace

int main() {
  constexpr int kSteps = 2;
  Model alone;
  alone.run(kSteps, {nullptr, 1, nullptr}, "alone");
  Pool threads(3);
  pool = &threads;
  const struct {
    const char* name;
    aim::ThreadPool pool;
    int32_t threads;
  } ways[] = {{"new threads", nullptr, 2},
              {"more new threads than tasks", nullptr, 40},
              {"a pool", lent, 3},
              {"a pool short of threads", short_of_threads, 7}};
  int cases = 0;
  aim::IsaInfo isas[8];
  int count = 0;
  aim::list_isas(isas, 8, &count);
  for (int i = 0; i < count; ++i) {
    if (!isas[i].supported) continue;
    for (const auto& way : ways) {
      const std::string what = std::string(way.name) + ", " + isas[i].name;
      Model model;
      model.run(kSteps, {way.pool, way.threads, isas[i].name}, what);
      expect(model.equals(alone), "bits, " + what);
      cases += 1 + streams({way.pool, way.threads, isas[i].name}, what);
    }
  }
  // Two optimizers at once: nothing is shared but the code.
  Model left, right;
  std::thread other([&] { left.run(kSteps, {nullptr, 2, nullptr}, "left"); });
  right.run(kSteps, {nullptr, 2, nullptr}, "right");
  other.join();
  expect(left.equals(alone) && right.equals(alone), "bits, two at once");
  std::printf("%d cases, %d failures\n", cases + 1, failures);
  return failures != 0;
}
