// Every header in common/ is compiled several times, once an instruction set.
// AIM_ISA names the namespace of the one at hand, so that the linker can never pick an AVX copy of
// an inline function for an older processor.
#pragma once

#include <cstdint>

#ifndef AIM_ISA
#define AIM_ISA baseline
#endif

#if defined(__CUDACC__)
#define AIM_INLINE __host__ __device__ __forceinline__
#else
#define AIM_INLINE inline __attribute__((always_inline))
#endif
