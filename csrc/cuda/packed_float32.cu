// The packed update kernel of float32 parameters.
#define AIM_ISA device
#define AIM_NAME float32
#define AIM_DTYPE kFloat32
#define AIM_STORAGE float
#define AIM_ARITHMETIC float
#include "cuda/packed_storage.h"
