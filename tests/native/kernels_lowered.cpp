// The widest kernels, compiled for any processor: the compiler splits 64-byte vectors into what
// there is.
#define AIM_ISA lowered
#define AIM_VECTOR_BYTES 64
#include "cpu/kernels.inl"
