// The kernels for "avx512"; setup.py gives this file its compiler flags.
#define AIM_ISA avx512
#define AIM_VECTOR_BYTES 64
#include "bench/stream_chunk.h"
#include "cpu/kernels.inl"
