// A stand-in for the CUDA runtime in which the processor is the device, so that csrc/cuda can be
// run, and looked at by sanitizers, where there is no GPU. Blocks run one after the other, in an
// order drawn anew for every launch; the threads of a block are threads of the system, and
// __syncthreads is a barrier between them (__syncwarp one between 32 of them): shared memory is as
// racy as on a device.
#pragma once

#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16), may_alias));

struct uint2 {
  uint32_t x, y;
} __attribute__((aligned(8), may_alias));

struct uint1 {
  uint32_t x;
} __attribute__((may_alias));

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned count) : x(count) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
using cudaStream_t = void*;

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};

struct Barrier {
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
  pthread_barrier_t barrier;
};

// 32 threads, the last of a block perhaps fewer.
struct Warp {
  static constexpr unsigned kSize = 32;
  explicit Warp(unsigned threads) : count(threads), barrier(threads) {}
  unsigned count;
  Barrier barrier;
  unsigned values[kSize];
};

inline thread_local Index thread_index, block_index, block_size, grid_size;
inline thread_local Barrier* barrier = nullptr;
inline thread_local Warp* warp = nullptr;
inline std::mt19937 order(20250819);

// Threads that wait for the next launch. They are never joined: a process that exits ends them.
class Pool {
 public:
  // body(i) for i in [0, count), each on a thread of its own, all at the same time.
  void run(unsigned count, const std::function<void(unsigned)>& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (size_ < count) {
      std::thread(&Pool::work, this, size_, launch_).detach();
      ++size_;
    }
    body_ = &body;
    count_ = running_ = count;
    ++launch_;
    start_.notify_all();
    done_.wait(lock, [&] { return running_ == 0; });
  }

 private:
  void work(unsigned number, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return launch_ != seen; });
      seen = launch_;
      if (number >= count_) continue;
      const std::function<void(unsigned)>& body = *body_;
      lock.unlock();
      body(number);
      lock.lock();
      if (--running_ == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(unsigned)>* body_ = nullptr;
  unsigned size_ = 0, count_ = 0, running_ = 0;
  uint64_t launch_ = 0;
};

inline Pool* const pool = new Pool;

template <class Argument>
void run(void (*kernel)(Argument), unsigned blocks, unsigned threads, const Argument& argument) {
  std::vector<unsigned> numbers(blocks);
  std::iota(numbers.begin(), numbers.end(), 0u);
  std::shuffle(numbers.begin(), numbers.end(), order);
  Barrier all(threads);
  std::deque<Warp> warps;
  for (unsigned first = 0; first < threads; first += Warp::kSize)
    warps.emplace_back(std::min(threads - first, Warp::kSize));
  pool->run(threads, [&](unsigned thread) {
    barrier = &all;
    warp = &warps[thread / Warp::kSize];
    thread_index = {thread};
    block_size = {threads};
    grid_size = {blocks};
    for (const unsigned block : numbers) {
      block_index = {block};
      all.wait();
      kernel(argument);
    }
    all.wait();
  });
}

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::thread_index)
#define blockIdx (::cuda_on_cpu::block_index)
#define blockDim (::cuda_on_cpu::block_size)
#define gridDim (::cuda_on_cpu::grid_size)

inline void __syncthreads() { cuda_on_cpu::barrier->wait(); }
inline void __syncwarp() { cuda_on_cpu::warp->barrier.wait(); }

// Of whole warps only.
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  cuda_on_cpu::Warp& warp = *cuda_on_cpu::warp;
  warp.values[threadIdx.x % warp.kSize] = x;
  warp.barrier.wait();
  const unsigned most = *std::max_element(warp.values, warp.values + warp.count);
  warp.barrier.wait();
  return most;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice  ? "invalid device ordinal"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                             size_t, cudaStream_t) {
  if (grid.x == 0 || block.x == 0 || block.x > 1024) return cudaErrorInvalidConfiguration;
  cuda_on_cpu::run(kernel, grid.x, block.x, *static_cast<const Argument*>(arguments[0]));
  return cudaSuccess;
}
