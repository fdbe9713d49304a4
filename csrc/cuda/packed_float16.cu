// The packed update kernel of float16 parameters.
#define AIM_ISA device
#define AIM_NAME float16
#define AIM_DTYPE kFloat16
#define AIM_STORAGE Float16
#define AIM_ARITHMETIC float
#include "cuda/packed_storage.h"
