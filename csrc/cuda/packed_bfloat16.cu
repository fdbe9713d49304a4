// The packed update kernel of bfloat16 parameters.
#define AIM_ISA device
#define AIM_NAME bfloat16
#define AIM_DTYPE kBFloat16
#define AIM_STORAGE BFloat16
#define AIM_ARITHMETIC float
#include "cuda/packed_storage.h"
