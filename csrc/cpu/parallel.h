// A team of threads that share loops out as they go. OpenMP makes it, or, in a build for
// ThreadSanitizer, which does not see the barriers of OpenMP's runtime, plain threads do.
#pragma once

#include <stdint.h>

#ifdef BGK_PLAIN_THREADS
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>
#endif

// Each file that includes this has its own copy: they are compiled for different processors.
namespace bgk {
namespace {

// Threads that `work` keeps busy, where `least` of it is worth one.
inline int threads_for(int64_t work, int64_t least, int threads) {
  const int64_t worth = work / least;
  return worth < 1 || threads < 1 ? 1 : worth < threads ? (int)worth : threads;
}

#ifndef BGK_PLAIN_THREADS

class Team {
 public:
  explicit Team(int thread) : thread(thread) {}

  // Calls f(i) for each i in [0, n), `step` of them at a time, and returns when all have returned.
  template <class F>
  void share(int64_t n, int64_t step, const F& f) {
#pragma omp for schedule(dynamic, step)
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  const int thread;  // a number of its own, from 0 on
};

// Calls f(team) in each of some threads.
template <class F>
void in_parallel(int threads, const F& f) {
  int next_thread = 0;
#pragma omp parallel num_threads(threads)
  {
    int thread;
#pragma omp atomic capture
    thread = next_thread++;
    Team team(thread);
    f(team);
  }
}

#else

struct Rounds {
  explicit Rounds(int threads) { pthread_barrier_init(&end, nullptr, (unsigned)threads); }
  ~Rounds() { pthread_barrier_destroy(&end); }

  std::atomic<int64_t> next[2] = {};  // of this round of shares, and of the next one
  pthread_barrier_t end;
};

class Team {
 public:
  Team(int thread, Rounds& rounds) : thread(thread), rounds_(rounds) {}

  template <class F>
  void share(int64_t n, int64_t step, const F& f) {
    std::atomic<int64_t>& next = rounds_.next[round_++ % 2];
    for (int64_t i = next.fetch_add(step); i < n; i = next.fetch_add(step)) {
      for (int64_t j = i; j < n && j < i + step; ++j) f(j);
    }
    pthread_barrier_wait(&rounds_.end);
    if (thread == 0) next = 0;
  }

  const int thread;

 private:
  Rounds& rounds_;
  int64_t round_ = 0;
};

template <class F>
void in_parallel(int threads, const F& f) {
  Rounds rounds(threads);
  auto run = [&](int thread) {
    Team team(thread, rounds);
    f(team);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
}

#endif

}  // namespace
}  // namespace bgk
