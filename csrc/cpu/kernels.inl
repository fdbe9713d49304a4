// The table of kernels of one instruction set. A unit kernels_<isa>.cpp names its namespace
// (AIM_ISA) and the bytes of its vectors (AIM_VECTOR_BYTES; absent: scalars), then includes this:
// the same source becomes the code of every instruction set.
#include "cpu/dispatch.h"
#include "cpu/norm_chunk.h"

namespace aim {
namespace AIM_ISA {

extern const KernelTable kKernels;  // external linkage, whichever namespace this is
const KernelTable kKernels = {update_any, emit_any, adopt_any, squares_any};

}  // namespace AIM_ISA
}  // namespace aim
