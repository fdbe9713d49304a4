// Whole optimizers on the emulated device: several groups, rules, storage types and sizes in one
// launch, parameters without gradients, gradients that are not finite, two devices.
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "aim/cuda.h"
#include "problem.h"

namespace {

using aim::DType;
using aim::Rule;
using aim::cuda::Chunk;
using aim::cuda::Span;
using aim::cuda::Work;

// Parameters in the order of their groups, with the tables of an optimizer.
struct Model {
  Model() {
    const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
    const int64_t sizes[] = {4097, 31, 0, 64, 1, 1000};
    // Live weights, anchor and noise; then whether there is a first moment, and state.
    const Case cases[] = {
        {Rule::kAdamW, DType::kFloat32, 0, true, true, true, false, true},
        {Rule::kSgd, DType::kFloat32, 0, true, false, false, true, true},
        {Rule::kAdam, DType::kFloat32, 0, false, false, false, false, true},
        {Rule::kSgd, DType::kFloat32, 0, true, false, true, false, false},
        {Rule::kSgd, DType::kFloat32, 0, false, false, false, true, false},
        {Rule::kSgd, DType::kFloat32, 0, false, false, true, false, true},
        {Rule::kAdagrad, DType::kFloat32, 0, true, false, true, false, true},
        {Rule::kRmsprop, DType::kFloat32, 0, true, true, false, true, true, aim::kCentered},
        {Rule::kLion, DType::kFloat32, 0, true, false, true, false, true},
        {Rule::kAdam, DType::kFloat32, 0, true, false, false, false, true, aim::kAmsgrad},
        {Rule::kLion, DType::kFloat32, 0, false, false, false, false, false},
        {Rule::kAdamW,
         DType::kFloat32,
         0,
         true,
         true,
         true,
         false,
         true,
         0,
         {aim::Moments::kInt8, aim::Weights::kNearest, true, true, false}},
        {Rule::kAdam,
         DType::kFloat32,
         0,
         false,
         false,
         false,
         false,
         true,
         aim::kAmsgrad,
         {aim::Moments::kBFloat16, aim::Weights::kStochastic, true, false, true}},
        {Rule::kRmsprop,
         DType::kFloat32,
         0,
         true,
         false,
         false,
         true,
         true,
         0,
         {aim::Moments::kInt8, aim::Weights::kKahan, false, true, true}},
        {Rule::kSgd,
         DType::kFloat32,
         0,
         false,
         false,
         true,
         true,
         false,
         0,
         {aim::Moments::kWide, aim::Weights::kSplit, false, false, true}}};
    int64_t first = 5;  // not a multiple of four: draws of noise straddle vectors
    for (const Case& one : cases) {
      const int32_t group = static_cast<int32_t>(groups.size());
      for (int i = 0; i < 4; ++i) {
        Case c = one;
        c.dtype = dtypes[(group + i) % 4];
        c.keep = c.keep.of(c.dtype);
        c.numel = sizes[(2 * group + i) % 6];
        const unsigned number = static_cast<unsigned>(params.size());
        params.push_back(std::make_unique<Problem>(c, number, number % 3 != 0));
        aim::Tensor& t = params.back()->tensor;
        t.group = group;
        t.first = first;
        first += c.numel;
        // Not stepped: live weights are emitted where there are some.
        if (i == 1 && group != 2) t.grad = nullptr;
        tensors.push_back(t);
      }
      groups.push_back(params.back()->group);
      rows.push_back(params.back()->row);
      statistics.push_back(params.back()->statistics);
    }
    groups[1].nesterov = 1;
    groups[2].scale = -1;
    groups[4].dampening = 0.25;
    groups[5].rate = 0;
    // A group without any gradient: its row is latched all the same.
    for (size_t i = 8; i < 12; ++i) tensors[i].grad = nullptr;
    // What squares in float32 lose, and what is not finite.
    float* const spoiled = params[0]->grad.as<float>();
    spoiled[3] = 3e38f;
    spoiled[2000] = std::numeric_limits<float>::quiet_NaN();
    spoiled[4096] = -std::numeric_limits<float>::infinity();
  }

  void step_on_processor() {
    const aim::StepTables tables{tensors.data(),
                                 groups.data(),
                                 rows.data(),
                                 statistics.data(),
                                 &control,
                                 static_cast<int64_t>(tensors.size()),
                                 static_cast<int64_t>(groups.size())};
    expect(aim::step(tables, {nullptr, 1, "scalar"}) == aim::Status::kOk, "step of groups");
  }

  void same_bits(const Model& other, const std::string& what) const {
    for (size_t i = 0; i < params.size(); ++i) {
      const Problem &p = *params[i], &q = *other.params[i];
      expect(p.same_memory(q), what + ", parameter " + std::to_string(i));
      expect(p.guards_intact(), what + ", guards of parameter " + std::to_string(i));
    }
    expect(!std::memcmp(rows.data(), other.rows.data(), rows.size() * sizeof(aim::Row)),
           what + ", rows");
    expect(!std::memcmp(&control, &other.control, sizeof control), what + ", control");
  }

  void near_statistics(const Model& other, const std::string& what) const {
    for (size_t g = 0; g < groups.size(); ++g)
      same_statistics(other.statistics[g], statistics[g], what + ", group " + std::to_string(g));
  }

  std::vector<std::unique_ptr<Problem>> params;
  std::vector<aim::Tensor> tensors;
  std::vector<aim::Group> groups;
  std::vector<aim::Row> rows;
  std::vector<aim::Statistics> statistics;
  aim::Control control{99, 3, int64_t{1} << 31, 1};
};

// Every `every`th parameter from `from` on, as one device's tables. The primary works on the
// model's own.
struct Device {
  Device(Model& model, size_t from, size_t every, bool primary, int32_t chunk_size, int32_t threads)
      : rows(model.rows), statistics(model.statistics), control(model.control) {
    const size_t count = model.groups.size();
    for (size_t g = 0; g < count; ++g) {
      Span span{static_cast<int64_t>(tensors.size()), 0, static_cast<int64_t>(chunks.size()), 0};
      for (size_t i = from; i < model.tensors.size(); i += every) {
        const aim::Tensor& t = model.tensors[i];
        if (t.group != static_cast<int32_t>(g)) continue;
        for (int32_t n = 0; static_cast<int64_t>(n) * chunk_size < t.numel; ++n)
          chunks.push_back({static_cast<int32_t>(tensors.size()), n});
        tensors.push_back(t);
      }
      span.tensor_end = static_cast<int64_t>(tensors.size());
      span.chunk_end = static_cast<int64_t>(chunks.size());
      spans.push_back(span);
    }
    partials.resize(chunks.size());
    sums.resize(primary ? 0 : count);
    work.tensors = tensors.data();
    work.families = aim::cuda::kAllFamilies;
    work.dtypes = 15;
    work.groups = model.groups.data();
    work.rows = primary ? model.rows.data() : rows.data();
    work.statistics = primary ? model.statistics.data() : statistics.data();
    work.control = primary ? &model.control : &control;
    work.chunks = chunks.data();
    work.spans = spans.data();
    work.partials = partials.data();
    work.phases = phases;
    work.sums = primary ? nullptr : sums.data();
    work.chunk_count = static_cast<int64_t>(chunks.size());
    work.group_count = static_cast<int64_t>(count);
    work.chunk_size = chunk_size;
    work.threads = threads;
  }

  void update() { expect(aim::cuda::update(work, 0, nullptr).error == 0, "update of groups"); }
  void finish() { expect(aim::cuda::finish(work, 0, nullptr).error == 0, "finish of groups"); }

  std::vector<aim::Tensor> tensors;
  std::vector<aim::Row> rows;
  std::vector<aim::Statistics> statistics, partials, sums;
  aim::Control control;
  std::vector<Chunk> chunks;
  std::vector<Span> spans;
  int64_t phases[2] = {-1, -1};
  Work work{};
};

void agree(int32_t chunk_size, int32_t threads) {
  const std::string what = "groups, chunks of " + std::to_string(chunk_size);
  Model expected, single, again, pair;
  Device one(single, 0, 1, true, chunk_size, threads), two(again, 0, 1, true, chunk_size, threads);
  for (int step = 0; step < 3; ++step) {
    expected.step_on_processor();
    for (Device* device : {&one, &two}) {
      device->update();
      device->finish();
    }
    single.same_bits(expected, what);
    single.near_statistics(expected, what);
    again.same_bits(single, what + ", again");
    const size_t bytes = single.statistics.size() * sizeof(aim::Statistics);
    expect(!std::memcmp(single.statistics.data(), again.statistics.data(), bytes) &&
               !std::memcmp(one.partials.data(), two.partials.data(),
                            one.partials.size() * sizeof(aim::Statistics)),
           what + ": sums depend on the order of the blocks");

    // Two devices, neither with whole groups.
    Device primary(pair, 0, 2, true, chunk_size, threads),
        away(pair, 1, 2, false, chunk_size, threads);
    away.update();
    away.finish();
    primary.work.others = away.sums.data();
    primary.work.others_count = 1;
    primary.update();
    primary.finish();
    pair.same_bits(expected, what + ", two devices");
    pair.near_statistics(expected, what + ", two devices");

    // Noise is measured by them.
    single.statistics = again.statistics = pair.statistics = expected.statistics;
  }
  expect(expected.statistics[0].nonfinite == 2 && expected.control.counter == 6, what + ": sense");

  for (Model* model : {&single, &expected}) {
    for (size_t i = 0; i < model->params.size(); ++i) {
      Problem& p = *model->params[i];
      if (model == &single && p.tensor.master)
        std::memset(p.param.data(), 0, p.count() * size_of(p.shape.dtype));
    }
  }
  expect(aim::cuda::emit(one.work, 0, nullptr).error == 0, what + ", emission");
  single.same_bits(expected, what + ", emission");
}

}  // namespace

void groups_agree() {
  agree(1024, 32);
#ifndef AIM_SMALL_TEST
  agree(4096, 256);
  agree(128, 64);
#endif
}
