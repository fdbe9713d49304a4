// The host's side: which kernel, how many blocks, and what the runtime said.
#define AIM_ISA device
#include "cuda/kernels.h"

namespace aim {
namespace cuda {
namespace {

constexpr Result kFine{0, ""};

Result failed(cudaError_t error, const char* call) { return {static_cast<int32_t>(error), call}; }

// Makes a device the current one, and what was current again at the end.
class Current {
 public:
  explicit Current(int32_t device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      moved_ = error_ == cudaSuccess;
    }
  }
  ~Current() {
    if (moved_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool moved_ = false;
  cudaError_t error_;
};

template <class Argument>
Result launch(void (*kernel)(Argument), const char* call, int64_t blocks, int32_t threads,
              Argument argument, int32_t device, void* stream) {
  if (blocks > INT32_MAX) return failed(cudaErrorInvalidConfiguration, call);
  const Current current(device);
  if (current.error() != cudaSuccess) return failed(current.error(), "choice of the device");
  void* arguments[] = {&argument};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                                             dim3(static_cast<unsigned>(threads)), arguments, 0,
                                             static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return kFine;
  cudaGetLastError();  // or the next call would report it again
  return failed(error, call);
}

bool has(const Work& work, Family family) { return (work.families >> family & 1) != 0; }

bool valid(const Work& work) {
  return work.threads >= 32 && work.threads <= kMostThreads && work.threads % 32 == 0 &&
         work.chunk_size > 0 && work.chunk_size <= kMostChunk &&
         work.chunk_size % (has(work, kPackedFamily) ? kPackedBlock : 64) == 0 &&
         work.chunk_count >= 0 && work.group_count >= 0 && work.others_count >= 0;
}

using Update = void (*)(Work);

// By storage type, then family.
constexpr Update kUpdates[4][4] = {{device::update_adam_float32, device::update_sgd_float32,
                                    device::update_other_float32, device::update_packed_float32},
                                   {device::update_adam_float64, device::update_sgd_float64,
                                    device::update_other_float64, device::update_packed_float64},
                                   {device::update_adam_bfloat16, device::update_sgd_bfloat16,
                                    device::update_other_bfloat16, device::update_packed_bfloat16},
                                   {device::update_adam_float16, device::update_sgd_float16,
                                    device::update_other_float16, device::update_packed_float16}};

}  // namespace

// One launch for each storage type and family that there is, each leaving the chunks of others
// alone.
Result update(const Work& work, int32_t device, void* stream) {
  constexpr const char* kCall = "launch of update";
  if (!valid(work)) return failed(cudaErrorInvalidValue, kCall);
  const int64_t blocks = work.chunk_count ? work.chunk_count : 1;
  // Somebody has to draw the phase.
  if (!work.families || !work.dtypes) {
    return launch(kUpdates[0][kAdamFamily], kCall, blocks, work.threads, work, device, stream);
  }
  for (int32_t dtype = 0; dtype < 4; ++dtype) {
    for (const Family family : {kAdamFamily, kSgdFamily, kOtherFamily, kPackedFamily}) {
      if (!has(work, family) || !(work.dtypes >> dtype & 1)) continue;
      const Update kernel = kUpdates[dtype][family];
      const Result result = launch(kernel, kCall, blocks, work.threads, work, device, stream);
      if (result.error) return result;
    }
  }
  return kFine;
}

Result finish(const Work& work, int32_t device, void* stream) {
  constexpr const char* kCall = "launch of finish";
  if (!valid(work)) return failed(cudaErrorInvalidValue, kCall);
  const int32_t threads =
      work.threads * 4 < device::kFinishThreads ? work.threads * 4 : device::kFinishThreads;
  const int64_t blocks = work.group_count ? work.group_count : 1;
  return launch(device::finish, kCall, blocks, threads, work, device, stream);
}

Result emit(const Work& work, int32_t device, void* stream) {
  constexpr const char* kCall = "launch of emit";
  if (!valid(work)) return failed(cudaErrorInvalidValue, kCall);
  if (work.chunk_count == 0) return kFine;
  return launch(device::emit, kCall, work.chunk_count, work.threads, work, device, stream);
}

Result copy_bytes(const void* from, void* to, int64_t bytes, int32_t device, void* stream) {
  constexpr const char* kCall = "launch of copy_bytes";
  const uint64_t either = reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to);
  if (bytes < 0 || either % 16 != 0) return failed(cudaErrorInvalidValue, kCall);
  if (bytes == 0) return kFine;
  // 16 KiB a block, up to what a grid is sure to fill a device with.
  const int64_t wanted = (bytes + 16383) / 16384;
  const int64_t blocks = wanted < 65536 ? wanted : 65536;
  return launch(device::copy_bytes, kCall, blocks, 512, device::Copy{from, to, bytes}, device,
                stream);
}

const char* describe(const Result& result) {
  return cudaGetErrorString(static_cast<cudaError_t>(result.error));
}

}  // namespace cuda
}  // namespace aim
