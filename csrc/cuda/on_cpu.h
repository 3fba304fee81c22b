// Runs the kernels on the CPU, slowly, so that tests can check everything but nvcc's device code
// and the device. Each CUDA thread is a fiber; a fiber runs until a warp or block operation, where
// it waits for the other threads of its warp or block. A thread that never arrives ends the
// process. Compile launch.cu as C++ with -include of this file.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#undef __shared__
#define __shared__ static  // one block runs at a time
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(threads)

namespace on_cpu {

enum State { kReady, kAtWarp, kAtBlock, kDone };

constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t start;
  jmp_buf here;  // resumes a started fiber: unlike setcontext, a jump costs no system call
  std::unique_ptr<char[]> stack{new char[kStack]};  // most of it is never touched
  State state;
  bool started;
  int exchanges;             // of its warp so far
  unsigned char shown[2][8];  // to its warp, in this exchange and the last
};

inline std::vector<Fiber> fibers;  // kept, since most of a short launch is fresh stacks
inline jmp_buf scheduler;
inline unsigned current;
inline void (*body)(void*);
inline void* body_argument;

__attribute__((noinline)) inline void wait(State state) {
  fibers[current].state = state;
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

inline void enter() {
  body(body_argument);
  fibers[current].state = kDone;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Makes the fibers [begin, end) ready again if all of them wait at `where`.
inline bool release(unsigned begin, unsigned end, State where) {
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].state != where) return false;
  for (unsigned i = begin; i < end; ++i) fibers[i].state = kReady;
  return true;
}

inline void run_block(unsigned block, unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;  // `enter` never returns
    fiber.state = kReady;
    fiber.started = false;
    fiber.exchanges = 0;
    makecontext(&fiber.start, enter, 0);
  }
  for (;;) {
    unsigned done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      // Odd blocks run their threads backwards, so that a data race changes results.
      current = block % 2 ? threads - 1 - i : i;
      if (fibers[current].state == kReady) go_on(fibers[current]);
    }
    for (unsigned i = 0; i < threads; ++i) done += fibers[i].state == kDone;
    if (done == threads) return;
    bool moved = release(0, threads, kAtBlock);
    for (unsigned warp = 0; warp < threads; warp += 32) moved |= release(warp, warp + 32, kAtWarp);
    if (!moved) {
      std::fprintf(stderr, "block %u: some threads wait for others that never arrive\n", block);
      std::abort();
    }
  }
}

template <class T>
T exchange(T mine, unsigned lane) {
  static_assert(sizeof(T) <= 8, "");
  const unsigned warp = current / 32 * 32;
  const int side = fibers[current].exchanges++ % 2;
  std::memcpy(fibers[current].shown[side], &mine, sizeof mine);
  wait(kAtWarp);
  std::memcpy(&mine, fibers[warp + lane % 32].shown[side], sizeof mine);
  return mine;
}

struct Index {
  struct {
    operator unsigned() const { return current; }
  } x;
};

}  // namespace on_cpu

inline on_cpu::Index threadIdx;
inline dim3 blockIdx;

inline void __syncthreads() { on_cpu::wait(on_cpu::kAtBlock); }

template <class T>
T __shfl_xor_sync(unsigned, T mine, int step) {
  return on_cpu::exchange(mine, on_cpu::current ^ step);
}

template <class T>
T __shfl_up_sync(unsigned, T mine, unsigned step) {
  const unsigned lane = on_cpu::current % 32;
  return on_cpu::exchange(mine, lane < step ? lane : lane - step);
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  unsigned all = mine ? 1u << on_cpu::current % 32 : 0;
  for (unsigned step = 1; step < 32; step *= 2) all |= __shfl_xor_sync(~0u, all, step);
  return all;
}

inline int __ffs(unsigned x) { return __builtin_ffs(x); }

template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument),
                               const Argument& argument) {
  struct Call {
    void (*kernel)(Argument);
    Argument argument;
  } call = {kernel, argument};
  if (on_cpu::fibers.size() < config->blockDim.x) on_cpu::fibers.resize(config->blockDim.x);
  on_cpu::body = [](void* at) { static_cast<Call*>(at)->kernel(static_cast<Call*>(at)->argument); };
  on_cpu::body_argument = &call;
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x)
    on_cpu::run_block(blockIdx.x, config->blockDim.x);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

extern "C" {
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOnCpu"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 9, cudaSuccess;
}
}
