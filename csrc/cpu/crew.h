// Threads that walk through the phases of a step together. Each phase is cut into chunks that any
// thread may take, and ends for a thread when all its chunks are done, so a phase needs no fixed
// number of threads and a late thread holds up none.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

struct alignas(64) Phase {
  std::atomic<int64_t> taken{0}, done{0};
};

// One per thread; all of them pass the same chunks to the same calls.
class Crew {
 public:
  explicit Crew(Phase* phase) : phase_(phase) {}

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

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Phase* phase_;
};
