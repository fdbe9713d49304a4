// The update kernels of float32 parameters.
#define AIM_ISA device
#define AIM_NAME float32
#define AIM_DTYPE kFloat32
#define AIM_STORAGE float
#define AIM_ARITHMETIC float
#include "cuda/update_storage.h"
