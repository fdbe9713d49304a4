// Which instruction set runs: one table, detected where it is asked for, no global state.
#include "aim/isa.h"

#include <cstring>

#include "cpu/kernels.h"

namespace aim {
namespace {

struct Entry {
  const char* name;
  const KernelTable* kernels;  // null: not in this build
  bool (*present)();           // does the processor have it?
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Slowest first.
const Entry kEntries[] = {
    {"scalar", &scalar::kKernels, always},
#if defined(__x86_64__)
    {"avx2", &avx2::kKernels, has_avx2},
    {"avx512", &avx512::kKernels, has_avx512},
    {"neon", nullptr, always},
#elif defined(__aarch64__)
    {"avx2", nullptr, always},
    {"avx512", nullptr, always},
    {"neon", &neon::kKernels, always},
#else
    {"avx2", nullptr, always},
    {"avx512", nullptr, always},
    {"neon", nullptr, always},
#endif
};
constexpr int kCount = sizeof kEntries / sizeof kEntries[0];

bool supported(const Entry& entry) { return entry.kernels && entry.present(); }

}  // namespace

Status list_isas(IsaInfo* into, int capacity, int* count) {
  *count = kCount;
  for (int i = 0; i < kCount && i < capacity; ++i) {
    into[i] = {kEntries[i].name, kEntries[i].kernels != nullptr, supported(kEntries[i])};
  }
  return capacity < kCount ? Status::kBadSize : Status::kOk;
}

Status choose_isa(const char* name, const char** chosen) {
  for (int i = kCount - 1; i >= 0; --i) {
    const Entry& entry = kEntries[i];
    if (name == nullptr || *name == '\0') {
      if (!supported(entry)) continue;
    } else if (std::strcmp(name, entry.name) != 0) {
      continue;
    } else if (!supported(entry)) {
      return Status::kUnsupportedIsa;
    }
    *chosen = entry.name;
    return Status::kOk;
  }
  return Status::kUnknownIsa;
}

const KernelTable& kernels_of(const char* isa) {
  for (const Entry& entry : kEntries) {
    if (entry.kernels && std::strcmp(isa, entry.name) == 0) return *entry.kernels;
  }
  return scalar::kKernels;
}

}  // namespace aim
