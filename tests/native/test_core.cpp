// The C++ core without Python, for sanitizers: every kernel of every instruction set that this
// processor has, and the widest one lowered to whatever the compiler has, must agree with the
// scalar kernels to the bit, stay inside its buffers, and change nothing when it refuses.
#include <cstdio>
#include <cstring>
#include <string>

#include "aim/isa.h"
#include "aim/step.h"
#include "common/shared.h"
#include "cpu/kernels.h"
#include "problem.h"

namespace aim {
// Kernels for 64-byte vectors, compiled without AVX-512: tests/native/kernels_lowered.cpp.
namespace lowered {
extern const KernelTable kKernels;
}
}  // namespace aim

namespace {

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
  u.old_c_v = 0.1;
  u.new_c_v = 0.2;
  u.old_c_0 = u.new_c_0 = 1e-12;
  u.eps = 1e-8;
  u.nesterov = u.lead_keep = u.extra_keep = 0.9;
  u.lead_add = 0.1;
  u.coupled = u.coupled_decay != 0;
  u.routed = true;
  u.is_nesterov = true;
  u.centered = (c.flags & aim::kCentered) != 0;
  u.buffered = c.rule == aim::Rule::kRmsprop && c.momentum;
  if (!(a.tensor.exp_avg && a.tensor.exp_avg_sq))
    u.grad[1] = u.grad[0], u.step[1] = u.step[0], u.live[1] = u.live[0];
  shared.variant = aim::baseline::variant_of(a.tensor, a.group);
  shared.has_noise = c.noisy;
  shared.seed = 99;
  shared.counter = 5;
  aim::Partial pa{}, pb{};
  aim::kernels_of("scalar").update(a.tensor, shared, 0, c.numel, &pa);
  aim::lowered::kKernels.update(b.tensor, shared, 0, c.numel, &pb);
  if (!(a.tensor.exp_avg && a.tensor.exp_avg_sq)) pa.under = pb.under = 0;  // no classes there
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
  refused("no second moment", aim::Status::kNullPointer,
          [](Problem& p) { p.tensor.exp_avg_sq = nullptr; });
  refused("no extra moment", aim::Status::kNullPointer,
          [](Problem& p) { p.group.flags = aim::kAmsgrad; });
  refused("centered without a mean", aim::Status::kNullPointer, [](Problem& p) {
    p.group.rule = static_cast<int32_t>(aim::Rule::kRmsprop);
    p.group.flags = aim::kCentered;
    p.tensor.exp_avg = nullptr;
  });
  refused("no step", aim::Status::kNullPointer, [](Problem& p) { p.tensor.step = nullptr; });
  refused("negative size", aim::Status::kBadSize, [](Problem& p) { p.tensor.numel = -1; });
  refused("overflowing index", aim::Status::kBadSize,
          [](Problem& p) { p.tensor.first = INT64_MAX - 5; });
  refused("bad group", aim::Status::kBadGroup, [](Problem& p) { p.tensor.group = 1; });
  refused("bad dtype", aim::Status::kBadDType, [](Problem& p) { p.tensor.dtype = 4; });
  refused("bad rule", aim::Status::kBadRule, [](Problem& p) { p.group.rule = 6; });
  refused("unknown isa", aim::Status::kUnknownIsa, [](Problem&) {}, "sse");
}

}  // namespace

int main() {
  using aim::DType;
  const int64_t sizes[] = {1, 15, 16, 17, 70, 1023, 1041, aim::kChunk, aim::kChunk + 5};
  int cases = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (bool live : {false, true}) {
      for (bool noisy : {false, true}) {
        for (int64_t numel : sizes) {
          for (const Case& c : variants(dtype, numel, live, noisy)) {
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
