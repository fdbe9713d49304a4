// Instruction sets: which were compiled in, which this processor has, which one a call would use.
#pragma once

#include "aim/step.h"

namespace aim {

struct IsaInfo {
  const char* name;
  bool compiled;   // in this build
  bool supported;  // compiled, and this processor has it
};

// All names ever known, slowest first; `count` receives their number. kBadSize if `capacity` is
// smaller.
Status list_isas(IsaInfo* into, int capacity, int* count);

// The one that `name` asks for (null or empty: the fastest supported); its name goes to `chosen`.
Status choose_isa(const char* name, const char** chosen);

}  // namespace aim
