// Threads that walk through the phases of a step together. Each phase is cut into chunks that any
// thread may take, and ends for a thread when all its chunks are done, so a phase needs no fixed
// number of threads and a late thread holds up none.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

struct alignas(64) Phase {
  std::atomic<int64_t> taken{0}, done{0};
};

// One per thread; all of them pass the same chunks to the same calls.
class Crew {
 public:
  Crew(Phase* phase, int64_t threads) : phase_(phase), threads_(threads) {}

  template <class Work>
  void each(int64_t chunks, const Work& work) {
    Phase& phase = *phase_++;
    for (int64_t chunk; (chunk = phase.taken.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      work(chunk);
      phase.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < chunks;) {
      if (++spins < 4096)
        pause();
      else
        sched_yield();
    }
  }

  // Cuts [0, total) into ranges for work(begin, end). In a round each thread takes an equal range,
  // all of them half of what is left, until the ranges would be shorter than `least`.
  template <class Work>
  void share(int64_t total, int64_t least, const Work& work) {
    int64_t rounds = 1;
    for (int64_t left = total; half(left) >= least; left -= threads_ * half(left)) ++rounds;
    each(rounds * threads_, [&](int64_t range) {
      int64_t left = total, size = half(left);
      for (; size >= least && range >= threads_; range -= threads_) {
        left -= threads_ * size;
        size = half(left);
      }
      if (size < least) size = (left + threads_ - 1) / threads_;
      const int64_t begin = std::min(total, total - left + range * size);
      const int64_t end = std::min(total, begin + size);
      if (begin < end) work(begin, end);
    });
  }

 private:
  int64_t half(int64_t left) const { return left / (2 * threads_); }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Phase* phase_;
  int64_t threads_;
};
