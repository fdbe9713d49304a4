// The update kernels of float64 parameters.
#define AIM_ISA device
#define AIM_NAME float64
#define AIM_DTYPE kFloat64
#define AIM_STORAGE double
#define AIM_ARITHMETIC double
#include "cuda/update_storage.h"
