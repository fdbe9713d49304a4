// The loops of the memory floor: what the unit of an instruction set provides of them, and all that
// stream.cpp knows.
#pragma once

#include <cstdint>

namespace aim {
namespace bench {

// The float32 arrays of one tensor.
struct StreamArrays {
  const float* grad;
  float *param, *m, *v, *master;
};

struct StreamTable {
  // Moves the bytes of a step over [begin, end).
  void (*arrays)(const StreamArrays& arrays, bool live, bool nontemporal, float factor,
                 int64_t begin, int64_t end);
  // Moves the bytes [begin, end) of a run of memory. Returns something of what it read.
  int32_t (*run)(char* run, bool reads, bool writes, int32_t add, int64_t begin, int64_t end);
};

}  // namespace bench

namespace scalar {
extern const bench::StreamTable kStreams;
}
namespace avx2 {
extern const bench::StreamTable kStreams;
}
namespace avx512 {
extern const bench::StreamTable kStreams;
}
namespace neon {
extern const bench::StreamTable kStreams;
}

}  // namespace aim
