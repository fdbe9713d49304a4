// The packed update kernel of float64 parameters.
#define AIM_ISA device
#define AIM_NAME float64
#define AIM_DTYPE kFloat64
#define AIM_STORAGE double
#define AIM_ARITHMETIC double
#include "cuda/packed_storage.h"
