// The kernels for "neon"; setup.py gives this file its compiler flags.
#define AIM_ISA neon
#define AIM_VECTOR_BYTES 16
#include "cpu/kernels.inl"
