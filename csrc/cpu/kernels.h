// The work on one chunk of one tensor: what a translation unit per instruction set provides
// (kernels_<isa>.cpp), and all that the driver (step.cpp) knows of it.
#pragma once

#include "aim/step.h"
#include "common/shared.h"

namespace aim {

struct Partial {
  double under, grad_sum, grad_sq, update_sq, param_sq, nonfinite;
};

struct KernelTable {
  // Steps elements [begin, end) of `tensor`, which lie in one chunk.
  void (*update)(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end,
                 Partial* partial);
  // Writes live weights of [begin, end) from the master and the class of the stored moments (the
  // "old" one of `shared`).
  void (*emit)(const Tensor& tensor, const Shared& shared, int64_t begin, int64_t end);
  // The master takes the elements [begin, end) that the parameter does not have from it.
  void (*adopt)(const Tensor& tensor, int64_t begin, int64_t end);
  // The sum of squares of the gradients [begin, end) of `tensor`.
  double (*squares)(const Tensor& tensor, int64_t begin, int64_t end);
};

namespace scalar {
extern const KernelTable kKernels;
}
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
namespace neon {
extern const KernelTable kKernels;
}

// The table of an instruction set that choose_isa() has accepted.
const KernelTable& kernels_of(const char* isa);

}  // namespace aim
