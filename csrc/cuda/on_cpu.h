// Runs the kernels on the CPU, slowly, so that tests can check everything but nvcc's device code
// and the device. Each CUDA thread is a fiber; a fiber runs until a warp, block or cluster
// operation, where it waits for the other threads. A thread that never arrives ends the process;
// threads that have ended count as arrived at the barriers of a block and of a cluster, as on a
// device. The thread blocks of a cluster are threads of the host, so that each has its own shared
// memory, which is thread-local; one of them runs at a time, up to the next cluster barrier.
// Compile launch.cu as C++ with -include of this file.
//
// Device 0 has clusters of up to 16 thread blocks, device 1 of up to 8, device 2 none.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#undef __shared__
#define __shared__ static thread_local
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(threads)

namespace on_cpu {

enum State { kReady, kAtWarp, kAtBlock, kAtCluster, kDone };

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

struct Launch {
  void (*body)(void*);
  void* argument;
  unsigned threads;  // per block
  unsigned cluster;  // blocks
};

// A thread block.
struct Block {
  const Launch* launch;
  unsigned index;
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  unsigned current;
};

inline Block* block;  // the one that runs
inline Block blocks[16];  // of a cluster; kept, since most of a short launch is fresh stacks

__attribute__((noinline)) inline void wait(State state) {
  Fiber& fiber = block->fibers[block->current];
  fiber.state = state;
  if (!_setjmp(fiber.here)) _longjmp(block->scheduler, 1);
}

inline void enter() {
  block->launch->body(block->launch->argument);
  block->fibers[block->current].state = kDone;
  _longjmp(block->scheduler, 1);
}

__attribute__((noinline)) inline void go_on(Fiber& fiber) {
  if (_setjmp(block->scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Makes the fibers [begin, end) ready again if all of them wait at `where`, or have ended.
inline bool release(unsigned begin, unsigned end, State where) {
  bool any = false;
  for (unsigned i = begin; i < end; ++i) {
    const State state = block->fibers[i].state;
    if (state != where && (state != kDone || where == kAtWarp)) return false;
    any |= state == where;
  }
  for (unsigned i = begin; i < end; ++i)
    if (block->fibers[i].state == where) block->fibers[i].state = kReady;
  return any;
}

// Runs `block` to its end; `meet` returns when the other blocks of the cluster are at its barrier.
template <class Meet>
void run_block(const Meet& meet) {
  const unsigned threads = block->launch->threads;
  if (block->fibers.size() < threads) block->fibers = std::vector<Fiber>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
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
      block->current = block->index % 2 ? threads - 1 - i : i;
      Fiber& fiber = block->fibers[block->current];
      if (fiber.state == kReady) go_on(fiber);
    }
    for (unsigned i = 0; i < threads; ++i) done += block->fibers[i].state == kDone;
    if (done == threads) return;
    bool moved = release(0, threads, kAtBlock);
    for (unsigned warp = 0; warp < threads; warp += 32) moved |= release(warp, warp + 32, kAtWarp);
    if (!moved && release(0, threads, kAtCluster)) {
      meet();
      moved = true;
    }
    if (!moved) {
      std::fprintf(stderr, "block %u: some threads wait for others that never arrive\n",
                   block->index);
      std::abort();
    }
  }
}

// Whose turn it is of the blocks of a cluster; one that has ended passes its turn on at once.
class Turns {
 public:
  explicit Turns(unsigned blocks) : ended_(blocks) {}

  void wait_for(unsigned rank) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return turn_ == rank; });
  }

  void pass_on(bool ended) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_[turn_] = ended;
    for (size_t i = 0; i < ended_.size(); ++i) {
      turn_ = (turn_ + 1) % ended_.size();
      if (!ended_[turn_]) break;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> ended_;
  unsigned turn_ = 0;
};

inline void run_cluster(const Launch& launch, unsigned first_block) {
  Turns turns(launch.cluster);
  std::vector<std::thread> threads;
  for (unsigned rank = 0; rank < launch.cluster; ++rank)
    threads.emplace_back([&, rank] {
      const auto take_turn = [&] {
        turns.wait_for(rank);
        block = &blocks[rank];
      };
      take_turn();
      block->launch = &launch;
      block->index = first_block + rank;
      run_block([&] {
        turns.pass_on(false);
        take_turn();
      });
      turns.pass_on(true);
    });
  for (std::thread& thread : threads) thread.join();
}

// Blocks without a cluster run one after the other.
inline void run_blocks(const Launch& launch, unsigned count) {
  block = blocks;
  block->launch = &launch;
  for (block->index = 0; block->index < count; ++block->index) run_block([] {});
}

template <class T>
T exchange(T mine, unsigned lane) {
  static_assert(sizeof(T) <= 8, "");
  std::vector<Fiber>& fibers = block->fibers;
  const unsigned current = block->current, warp = current / 32 * 32;
  const int side = fibers[current].exchanges++ % 2;
  std::memcpy(fibers[current].shown[side], &mine, sizeof mine);
  wait(kAtWarp);
  std::memcpy(&mine, fibers[warp + lane % 32].shown[side], sizeof mine);
  return mine;
}

struct Thread {
  operator unsigned() const { return block->current; }
};
struct Of {
  operator unsigned() const { return block->index; }
};
struct Size {
  operator unsigned() const { return block->launch->threads; }
};
template <class X>
struct Index {
  X x;
};

inline int device;    // the current one
inline int launches;  // so far
inline constexpr unsigned kLargest[] = {16, 8, 0};  // blocks of a cluster, by device

}  // namespace on_cpu

inline on_cpu::Index<on_cpu::Thread> threadIdx;
inline on_cpu::Index<on_cpu::Of> blockIdx;
inline on_cpu::Index<on_cpu::Size> blockDim;

inline void __syncthreads() { on_cpu::wait(on_cpu::kAtBlock); }

inline unsigned __clusterSizeInBlocks() { return on_cpu::block->launch->cluster; }
inline void __cluster_barrier_arrive() { on_cpu::wait(on_cpu::kAtCluster); }
inline void __cluster_barrier_wait() {}  // `arrive` has waited

template <class T>
T __shfl_xor_sync(unsigned, T mine, int step) {
  return on_cpu::exchange(mine, on_cpu::block->current ^ step);
}

template <class T>
T __shfl_up_sync(unsigned, T mine, unsigned step) {
  const unsigned lane = on_cpu::block->current % 32;
  return on_cpu::exchange(mine, lane < step ? lane : lane - step);
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  unsigned all = mine ? 1u << on_cpu::block->current % 32 : 0;
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
  on_cpu::Launch launch = {};
  launch.body = [](void* at) { static_cast<Call*>(at)->kernel(static_cast<Call*>(at)->argument); };
  launch.argument = &call;
  launch.threads = config->blockDim.x;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      launch.cluster = config->attrs[i].val.clusterDim.x;
  ++on_cpu::launches;
  if (launch.cluster == 0) on_cpu::run_blocks(launch, config->gridDim.x);
  else
    for (unsigned first = 0; first < config->gridDim.x; first += launch.cluster)
      on_cpu::run_cluster(launch, first);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

extern "C" {
inline cudaError_t cudaGetDevice(int* device) { return *device = on_cpu::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return on_cpu::device = device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOnCpu"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  return *value = on_cpu::kLargest[device] > 0 ? 9 : 8, cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                                  const cudaLaunchConfig_t* config) {
  const unsigned blocks = config->attrs->val.clusterDim.x;
  if (blocks > on_cpu::kLargest[on_cpu::device]) return cudaErrorInvalidClusterSize;
  return *count = 132 / blocks, cudaSuccess;
}
__attribute__((used, visibility("default"))) inline int svd_on_cpu_launches() {
  return on_cpu::launches;
}
}
