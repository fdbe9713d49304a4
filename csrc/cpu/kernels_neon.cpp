// The kernels for "neon"; setup.py gives this file its compiler flags.
#define AIM_ISA neon
#define AIM_VECTOR_BYTES 16
#include "bench/stream_chunk.h"
#include "cpu/kernels.inl"
