// The kernels for "scalar"; setup.py gives this file its compiler flags.
#define AIM_ISA scalar
#include "bench/stream_chunk.h"
#include "cpu/kernels.inl"
