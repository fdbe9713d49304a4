// The kernels for "avx2"; setup.py gives this file its compiler flags.
#define AIM_ISA avx2
#define AIM_VECTOR_BYTES 32
#include "bench/stream_chunk.h"
#include "cpu/kernels.inl"
