// Work for several threads, none of which is started here: the caller hands over the GOMP_parallel of the OpenMP that torch
// runs on, so that there is one pool and not two that spin against each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace ggtool {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Clock = std::chrono::steady_clock;

// Whether to call upon other threads. On a busy machine a thread may wait milliseconds for a core, and OpenMP's barriers
// wait with it, before and after work that takes microseconds. When they did, the next calls are done alone: `fewest` of
// them, and each time that it happens again twice as many, up to `most`.
class Company {
 public:
  constexpr Company(int fewest, int most) : fewest_(fewest), most_(most), pause_(fewest) {}
  bool is_wanted() { return alone_.load(std::memory_order_relaxed) <= 0 || alone_.fetch_sub(1) <= 0; }
  void waited(Clock::duration time) {
    const bool is_long = time >= std::chrono::microseconds(500);
    const int next = is_long ? std::min(2 * pause_.load(), most_) : fewest_;
    if (is_long) alone_.store(next / 2);
    pause_.store(next);
  }

 private:
  const int fewest_, most_;
  std::atomic<int> alone_{0}, pause_;
};

// Call `run()` on as many threads, of which this is one, unless the others kept such calls waiting lately.
template <class Run>
void on_threads(Parallel parallel, int n_threads, Company& company, const Run& run) {
  if (!parallel || n_threads < 2 || !company.is_wanted()) {
    run();
    return;
  }
  struct Shared {
    const Run& run;
    const std::thread::id caller = std::this_thread::get_id();
    Clock::time_point started{}, done{};
  } shared{run};
  const Clock::time_point called = Clock::now();
  parallel(
      [](void* data) {
        Shared& all = *static_cast<Shared*>(data);
        const bool is_caller = std::this_thread::get_id() == all.caller;
        if (is_caller) all.started = Clock::now();
        all.run();
        if (is_caller) all.done = Clock::now();
      },
      &shared, static_cast<unsigned>(n_threads), 0);
  company.waited((shared.started - called) + (Clock::now() - shared.done));
}

// Rows [0, n), handed out in runs that get shorter towards the end: a long run is one stream from memory, and short ones let
// the threads end together. Whichever thread comes first takes the next; one that comes late finds none left.
class Tasks {
 public:
  void begin(int64_t n, int64_t step, int n_threads) {
    n_ = n, step_ = step, share_ = n_threads > 1 ? 2 * n_threads : 1;
    next_.store(0, std::memory_order_relaxed);
  }
  // Take rows [at, end); false where none are left.
  bool take(int64_t& at, int64_t& end) {
    at = next_.load(std::memory_order_relaxed);
    do {
      if (at >= n_) return false;
      end = std::min(n_, at + std::max<int64_t>((n_ - at) / share_ / step_, 1) * step_);
    } while (!next_.compare_exchange_weak(at, end, std::memory_order_relaxed));
    return true;
  }

 private:
  int64_t n_ = 0, step_ = 1, share_ = 1;
  std::atomic<int64_t> next_{0};
};

// Have rows [0, n) done in runs of `step` rows at least.
template <class Work>
void for_rows(Parallel parallel, int n_threads, int64_t n, int64_t step, const Work& work) {
  static Company company(32, 4096);
  Tasks tasks;
  tasks.begin(n, step, n_threads);
  on_threads(n > step ? parallel : nullptr, n_threads, company, [&] {
    for (int64_t at, end; tasks.take(at, end);) work(at, end);
  });
}

// Wait for some forty nanoseconds, and leave the core to its other thread meanwhile.
inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline float* thread_floats(int64_t n) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < n) kept.resize(n);
  return kept.data();
}

}  // namespace ggtool
