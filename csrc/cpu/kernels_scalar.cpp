// The kernels for "scalar"; setup.py gives this file its compiler flags.
#define AIM_ISA scalar
#include "cpu/kernels.inl"
